"""Make the README's moving picture: a real training, held at update after update, as a browser shows it.

    python tools/make_panel_picture.py [FOLDER]      # needs Playwright and a Chromium

A teacher is fine-tuned on the toy task as the tutorial does it (two minutes; FOLDER keeps it for another
time), a LAD student is stepped, and the session that `Stepper.save_html` leaves is photographed at each of
its updates. The frames become nbs/images/panel.webp.
"""
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageOps
from playwright.sync_api import sync_playwright

from lad_nb.experiment import run
from lad_nb.recipes import Recipe
from lad_nb.stepper import Stepper

PICTURE = Path(__file__).parents[1]/'nbs'/'images'/'panel.webp'
CHROMIUM = os.environ.get('LAD_NB_CHROMIUM') or shutil.which('chromium') or '/usr/bin/chromium'
HELD = [*range(1, 13), *range(14, 32, 2), *range(35, 81, 5)]  # updates at which the run is held: slower first
WIDTH, SECONDS, MOST = 980, .45, 1_000_000                    # pixels of the page, of a frame, and bytes

few = dict(task='toy', max_seq_len=32, ckpt_step=1000, log_step=1, device_id=-1)
teacher = Recipe('teacher', method='fine_tune', ptrain_ver='all-minilm-l6-v2', lr=1e-4, batch_size=24,
                 total_step=200, warmup_step=30, **few)
student = Recipe('lad', method='lad', num_hidden_layers=3, teacher_exp='teacher', gate_lr=3e-4, batch_size=16,
                 total_step=200, warmup_step=20, **few)


def session(root):
    "Step the student, and leave the session as a page."
    run(teacher, root, resume=True)
    shutil.rmtree(root/'lad_bert_toy', ignore_errors=True)
    with Stepper(student, root) as stepper:
        for update in HELD:
            stepper.step(update - stepper.done)
        return stepper.save_html(root/'session.html')


def frames(page_file):
    "The page at each update, from the first to the last."
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=WIDTH, height=600))
        page.goto(page_file.as_uri())
        for i in range(len(HELD)):
            page.locator('#lad-slider').fill(str(i))
            yield Image.open(io.BytesIO(page.screenshot(full_page=True))).convert('RGB')
        browser.close()


def main(root):
    "Make the picture; its size is checked."
    pictures = list(frames(session(root)))
    size = pictures[0].width, max(picture.height for picture in pictures)
    pictures = [ImageOps.pad(picture, size, color='white', centering=(0, 0)) for picture in pictures]
    times = [int(1000*SECONDS)]*(len(pictures) - 1) + [3000]
    PICTURE.parent.mkdir(exist_ok=True)
    pictures[0].save(PICTURE, save_all=True, append_images=pictures[1:], duration=times, loop=0, method=4,
                     lossless=True, quality=70)  # of text, lossless is smaller than lossy
    found = PICTURE.stat().st_size
    print(f'{PICTURE.name}: {len(pictures)} frames of {size[0]} x {size[1]}, {found:,} bytes')
    if found > MOST: sys.exit(f'larger than {MOST:,} bytes: take fewer frames, or a lower quality')


if __name__ == '__main__':
    if len(sys.argv) > 1: main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder: main(Path(folder))
