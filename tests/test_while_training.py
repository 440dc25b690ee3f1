"""Scores while a run trains: the training takes no notice, the best student is kept, a killed run goes on."""
import json
import os
import signal

import pytest
from conftest import FILES, same_bytes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from lad_nb.cli import main, parse, recipe_of
from lad_nb.data import load_task
from lad_nb.encoders import load_classifier
from lad_nb.evaluation import costs, evaluate, write_predictions
from lad_nb.experiment import open_run, rerun, resolve, run
from lad_nb.models import load_tokenizer
from lad_nb.recipes import Recipe, check_recipe
from lad_nb.runs import checkpoints, max_seq_len_of, read_log
from lad_nb.similarity import dev_losses, loss_parts
from lad_nb.sources import find_teacher
from lad_nb.stepper import Stepper
from lad_nb.tasks import get_task, own_task, tasks, write_task
from lad_nb.training import ending_of

WATCH = dict(eval_step=2, keep_best=True)


@pytest.fixture(scope='module')
def base(tiny):
    """A recipe of twelve updates of a tiny student, with dropout."""
    return Recipe('LAD', task='toy', num_hidden_layers=2, teacher=str(tiny), ptrain_ver=str(tiny), lr=3e-2,
                  gate_lr=1e-2, train_size=100, max_seq_len=24, batch_size=8, total_step=12, warmup_step=2,
                  ckpt_step=4, log_step=3, device_id=-1)


@pytest.fixture(scope='module')
def dev(): return load_task('toy', 'dev', size=60)


@pytest.fixture(scope='module')
def best(base, dev, tmp_path_factory):
    """A run that ends with its best checkpoint."""
    return run(base.replace(**WATCH), tmp_path_factory.mktemp('best'), progress=False, eval_rows=dev)


def evaluations(folder): return [line for line in read_log(folder) if 'eval_loss' in line]


def weights(folder): return [(folder/name).read_bytes() for name in FILES[:2]]


class Dies(TrainerCallback):
    """Kills its process with the update of a step."""
    def __init__(self, step): self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step: os.kill(os.getpid(), signal.SIGKILL)


def killed(step, recipe, root, **how):
    """A run in a process of its own that is killed in the middle of an update."""
    if not (child := os.fork()):
        try: run(recipe, root, progress=False, callbacks=[Dies(step)], **how)
        finally: os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


KEPT = dict(keep_last_batch=True, accum_step=2, method='kd')


@pytest.mark.parametrize('form', [{}, dict(teacher_cache=True, length_groups=True),
                                  pytest.param(KEPT, marks=pytest.mark.slow)])
def test_training_takes_no_notice_of_scores(base, tmp_path, form):
    plain = run(base.replace(**form), tmp_path/'plain', progress=False)
    both = base.replace(eval_step=8, eval_on=('dev', 'train'), **form)
    scored = run(both, tmp_path/'scored', progress=False)
    assert (plain/FILES[0]).read_bytes() == (scored/FILES[0]).read_bytes()
    assert [line for line in read_log(scored) if 'loss' in line] == read_log(plain)
    assert [line['step'] for line in evaluations(scored)] == []  # two splits: each has its name in the keys
    named = [line for line in read_log(scored) if 'eval_train_accuracy' in line]
    assert [line['step'] for line in named] == [8, 12]
    assert loss_parts(scored).equals(loss_parts(plain))


def test_a_run_without_scores_says_nothing_of_them(base, tmp_path):
    folder = run(base, tmp_path, progress=False)
    said = json.loads((folder/'recipe.json').read_text())
    assert not {'eval_step', 'eval_on', 'keep_best', 'patience', 'report_to'} & said['recipe'].keys()
    assert 'scored_on' not in said and not (folder/'ending.json').exists()


def test_scores_are_those_of_the_checkpoints(base, tmp_path):
    folder = run(base.replace(eval_step=4), tmp_path, progress=False)
    lines, losses = evaluations(folder), dev_losses(folder)
    assert [line['step'] for line in lines] == [*checkpoints(folder)] == [4, 8, 12]
    for line, row in zip(lines, losses.to_dict('records')):
        said = evaluate(folder/f"checkpoint-{line['step']}", 'toy', max_seq_len=24)
        assert line['eval_accuracy'] == said['accuracy']
        assert [line[f'eval_{n}'] for n in ('loss', 'hard', 'soft')] == \
               pytest.approx([row[n] for n in ('loss', 'hard', 'soft')], rel=1e-5)
    board = EventAccumulator(str(folder/'tensorboard')).Reload()
    assert [e.value for e in board.Scalars('eval/accuracy')] == \
           pytest.approx([line['eval_accuracy'] for line in lines])


def test_a_teacher_is_scored_while_it_is_fine_tuned(base, tmp_path):
    recipe = base.replace(method='fine_tune', teacher=None, num_hidden_layers=None, eval_step=6)
    line = evaluations(run(recipe, tmp_path, progress=False))[-1]
    assert line['eval_loss'] == line['eval_hard'] and 'eval_soft' not in line


def test_it_ends_with_the_best_checkpoint_and_says_so(best, dev):
    scores = {line['step']: line['eval_accuracy'] for line in evaluations(best)}
    ending = ending_of(best)
    first = min(step for step, value in scores.items() if value == max(scores.values()))
    assert ending == dict(checkpoint=first, updates=12, stopped_early=False,
                          chosen=dict(on='rows', metric='accuracy', score=max(scores.values())))
    assert first < 12, 'choose another seed: the last is the best'
    assert weights(best) == weights(best/f'checkpoint-{first}') != weights(best/'checkpoint-12')
    assert evaluate(best, 'toy', max_seq_len=24, rows=dev)['accuracy'] == max(scores.values())
    assert open_run(best)[2].keep_best
    kept = json.loads((best/'checkpoint-12'/'trainer_state.json').read_text())
    assert kept['best_global_step'] == first and kept['best_model_checkpoint'] is None


def test_the_best_checkpoint_outlives_its_age(base, dev, best, tmp_path):
    folder = run(base.replace(keep_ckpt=1, **WATCH), tmp_path, progress=False, eval_rows=dev)
    assert [*checkpoints(folder)] == [ending_of(best)['checkpoint'], 12]
    assert same_bytes(folder, best) and ending_of(folder) == ending_of(best)


def test_a_student_learns_from_what_its_teacher_ended_with(base, best):
    """The best checkpoint of a teacher with keep_best; the last of one without; another by its number."""
    student = base.replace(experiment='x', teacher=None, teacher_exp='LAD')
    ended = ending_of(best)['checkpoint']
    taught = [find_teacher(student.replace(tckpt=n), best.parent).folder for n in (None, 12)]
    assert [f.name for f in taught] == [f'checkpoint-{ended}', 'checkpoint-12'] and ended < 12
    assert (taught[0]/FILES[0]).read_bytes() == (best/FILES[0]).read_bytes()
    (best/'ending.json').rename(aside := best.parent/'ending.json')  # as after a run without it
    try: assert find_teacher(student, best.parent).folder.name == 'checkpoint-12'
    finally: aside.rename(best/'ending.json')


def test_predictions_are_those_of_the_checkpoint_that_a_run_ended_with(best, capsys):
    flags = f'--experiment LAD --task toy --dataset dev --device_id -1 --root {best.parent}'.split()
    place, asked = f"checkpoint-{ending_of(best)['checkpoint']}", ['generate_test_prediction', *flags]
    assert main([*asked, '--dry_run']) == 0
    assert [os.path.basename(p) for p in json.loads(capsys.readouterr().out)['checkpoints']] == [place]
    assert main(asked) == 0
    assert f'predictions/{place}/' in capsys.readouterr().out


def test_a_run_goes_again_with_the_teacher_that_it_had(base, best):
    """Its experiment has another end than the checkpoint that was learned from."""
    student = base.replace(experiment='again', teacher=None, teacher_exp='LAD', tckpt=12, total_step=3)
    folder = run(student, best.parent, progress=False)
    said = json.loads((folder/'recipe.json').read_text())
    said['recipe']['tckpt'] = None  # the last, when it began
    (folder/'recipe.json').write_text(json.dumps(said))
    twin = rerun(folder, progress=False)
    assert same_bytes(twin, folder)
    told = json.loads((twin/'recipe.json').read_text())
    assert told['teacher'] == said['teacher'] and told['recipe']['teacher_exp'] is None


def test_a_teacher_is_named_once(base, tmp_path, capsys):
    with pytest.raises(ValueError, match="teacher_exp is 'other' and tckpt is 231 as well.*Take one of the"):
        resolve(base.replace(teacher_exp='other', tckpt=231), tmp_path)
    asked = f'eval_dev_loss --experiment x --task toy --teacher {base.teacher} --root {tmp_path}'.split()
    assert main([*asked, '--tckpt', '4']) == 2
    assert 'and tckpt is 4 as well' in capsys.readouterr().err


@pytest.mark.parametrize('step', [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 11))])
def test_a_killed_run_goes_on_to_the_same_end(base, dev, best, tmp_path, step):
    killed(step, base.replace(**WATCH), tmp_path, eval_rows=dev)
    os.rename(tmp_path, moved := tmp_path.with_name(f'moved{step}'))
    with pytest.raises(ValueError, match='Give the same rows again: eval_rows=|it began with True'):
        run(base.replace(**WATCH), moved, resume=True, progress=False)
    folder = run(base.replace(**WATCH), moved, resume=True, progress=False, eval_rows=dev)
    assert same_bytes(folder, best) and ending_of(folder) == ending_of(best)


@pytest.mark.slow
def test_patience_ends_a_run_and_a_kill_does_not_renew_it(base, dev, best, tmp_path):
    recipe = base.replace(patience=2, total_step=40, warmup_step=2, **WATCH)
    whole = run(recipe, tmp_path/'whole', progress=False, eval_rows=dev)
    ending, scores = ending_of(whole), [line['eval_accuracy'] for line in evaluations(whole)]
    assert ending['stopped_early'] and ending['updates'] == ending['checkpoint'] + 4 == 2*len(scores) < 40
    assert max(scores[-2:]) <= ending['chosen']['score'] == max(scores)
    killed(ending['updates'] - 1, recipe, tmp_path/'killed', eval_rows=dev)
    for _ in range(2):  # the second time it is over, and stays as it is
        folder = run(recipe, tmp_path/'killed', resume=True, progress=False, eval_rows=dev)
        assert same_bytes(folder, whole) and ending_of(folder) == ending


def test_a_stepper_scores_rows_that_are_given(base, dev, best, tmp_path):
    """As a run does, also when it goes on."""
    with Stepper(base.replace(**WATCH), tmp_path, eval_rows=dev) as held: held.step(5)
    held.resume()
    held.run_until()
    assert same_bytes(held.folder, best) and ending_of(held.folder) == ending_of(best)


def test_the_best_is_chosen_on_dev_wherever_dev_is_named(base, tmp_path):
    plan = resolve(base.replace(**WATCH, eval_on=('train', 'dev')), tmp_path)
    assert plan.best_metric == 'dev_accuracy' and [*plan.eval_rows] == ['dev', 'train']
    assert resolve(base.replace(**WATCH, eval_on=('train',)), tmp_path).best_metric == 'accuracy'


def test_what_is_scored_is_named_once(base, dev, tmp_path):
    with pytest.raises(ValueError, match=r"eval_on is \('train',\), and eval_rows were given as well"):
        resolve(base.replace(eval_step=4, eval_on=('train',)), tmp_path, eval_rows=dev)


def test_rows_to_score_on_are_asked_for_where_a_task_has_no_folder(base, dev, tmp_path):
    """Rows to train on were given; those to score on are not found by themselves."""
    own_task('given', get_task('toy').labels, ('sentence1', 'sentence2'))
    try:
        recipe = base.replace(task='given', eval_step=4, train_size=None)
        with pytest.raises(FileNotFoundError, match='given has no folder with a dev split.*eval_rows=') as e:
            resolve(recipe, tmp_path, rows=load_task('toy', size=40))
        assert '(rows=' not in str(e.value)
        plan = resolve(recipe, tmp_path, rows=load_task('toy', size=40), eval_rows=dev)
        assert [*plan.eval_rows] == ['rows']
    finally: tasks.pop('given')


@pytest.mark.slow
def test_a_stepper_takes_the_same_updates(base, tmp_path):
    recipe = base.replace(eval_step=4)
    plain = run(recipe, tmp_path/'plain', progress=False)
    with Stepper(recipe, tmp_path/'held') as stepper: stepper.run_until()
    assert same_bytes(stepper.folder, plain)


def test_a_later_setting_does_not_get_lost_on_the_way(base, dev, best):
    with pytest.raises(ValueError, match='eval_step is None, it began with 2'):
        resolve(base, best.parent, like=best)


def test_writing_over_gives_the_same_bytes(base, tmp_path):
    recipe = base.replace(total_step=4)
    folder = run(recipe, tmp_path, progress=False, overwrite=True)
    first = {name: (folder/name).read_bytes() for name in FILES}
    run(recipe, tmp_path, progress=False, overwrite=True)
    assert first == {name: (folder/name).read_bytes() for name in FILES}
    longer = run(base.replace(total_step=6), tmp_path, progress=False, overwrite=True)
    assert longer == folder and [*checkpoints(folder)] == [4, 6]
    with pytest.raises(FileExistsError, match=r'resume=True, --resume.*overwrite=True, --overwrite'):
        run(recipe, tmp_path, progress=False)


def test_only_a_run_is_written_over(base, tmp_path):
    recipe = base.replace(total_step=4)
    folder = run(recipe, tmp_path, progress=False)
    (folder/'notes.md').write_text('mine')
    kept = {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    with pytest.raises(FileExistsError, match='notes.md, which no run writes'):
        run(recipe, tmp_path, progress=False, overwrite=True)
    (folder/'notes.md').unlink()
    with pytest.raises(ValueError, match='take one of the two'):
        run(recipe, tmp_path, resume=True, progress=False, overwrite=True)
    with pytest.raises(ValueError, match='lies in the folder that would be written over'):
        itself = recipe.replace(teacher=str(folder/'checkpoint-4'), method='kd')
        run(itself, tmp_path, progress=False, overwrite=True)
    (folder/'recipe.json').rename(tmp_path/'recipe.json')
    with pytest.raises(FileExistsError, match='has no recipe.json'):
        run(recipe, tmp_path, progress=False, overwrite=True)
    assert all(p.read_bytes() == raw for p, raw in kept.items() if p.name not in ('notes.md', 'recipe.json'))


def test_a_short_training_has_a_short_warmup(base, tmp_path):
    asked = base.replace(total_step=20, warmup_step=Recipe.warmup_step)
    plan = resolve(asked, tmp_path)
    assert (plan.recipe.warmup_step, plan.recipe.gate_steps) == (6, (6, 20))
    with pytest.raises(ValueError, match='warmup_step 21 is more than total_step 20'):
        check_recipe(asked.replace(warmup_step=21))
    enough = base.replace(total_step=400, warmup_step=Recipe.warmup_step)
    assert resolve(enough, tmp_path).recipe.warmup_step == 346  # as ever


def test_the_fields_are_flags():
    words = ('run_lad_distil --experiment x --task toy --eval_step 4 --eval_on dev,train --keep_best '
             '--patience 2 --report_to mlflow,trackio --overwrite').split()
    args = parse(words)
    recipe = recipe_of(args)
    assert args.overwrite and (recipe.eval_step, recipe.eval_on) == (4, ('dev', 'train'))
    assert (recipe.keep_best, recipe.patience, recipe.report_to) == (True, 2, ('mlflow', 'trackio'))


def test_a_tracker_that_is_not_there_says_how_to_get_it(base, tmp_path):
    with pytest.raises(ValueError, match="'clearml', which is not ready here: .*pip install clearml"):
        resolve(base.replace(report_to='clearml'), tmp_path)
    with pytest.raises(ValueError, match="report_to names 'excel'. Trackers are: "):
        resolve(base.replace(report_to='excel'), tmp_path)


def test_a_tracker_gets_the_numbers_of_the_log(base, tmp_path, monkeypatch):
    mlflow = pytest.importorskip('mlflow', reason='mlflow is not installed: pip install lad_nb[trackers]')
    monkeypatch.setenv('MLFLOW_TRACKING_URI', place := (tmp_path/'mlruns').as_uri())
    monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
    monkeypatch.chdir(tmp_path)
    folder = run(base.replace(eval_step=4, report_to='mlflow'), tmp_path, progress=False)
    client = mlflow.MlflowClient(place)
    [found] = [r for e in client.search_experiments() for r in client.search_runs([e.experiment_id])]
    assert found.info.run_name == folder.name
    for name in ('eval_accuracy', 'hidden_1'):
        told = [m.value for m in client.get_metric_history(found.info.run_id, name)]
        assert told == pytest.approx([line[name] for line in read_log(folder) if name in line])
    twin = rerun(folder, progress=False)  # somebody's trackers are not turned on
    assert len(client.search_runs([found.info.experiment_id])) == 1
    assert same_bytes(twin, folder)


@pytest.mark.parametrize('form', [{}, dict(teacher_cache=True)])
def test_no_row_is_padded_to_more_than_a_model_has_positions(base, dev, tiny, tmp_path, form):
    """Twenty of them, and rows that fill them: the next multiple of eight would be too long."""
    few = BertConfig.from_pretrained(tiny, max_position_embeddings=20)
    BertForSequenceClassification(few).save_pretrained(tmp_path/'few')
    load_tokenizer(tiny).save_pretrained(tmp_path/'few')
    long = [dict(row, sentence1=' '.join([row['sentence1']]*5)) for row in dev]
    recipe = base.replace(teacher=str(tmp_path/'few'), ptrain_ver=str(tmp_path/'few'), max_seq_len=20,
                          train_size=None, total_step=2, warmup_step=1, eval_step=2, **form)
    folder = run(recipe, tmp_path, progress=False, rows=long, eval_rows=long)
    scores = evaluate(folder, 'toy', rows=long, max_seq_len=20)
    assert scores['accuracy'] == evaluations(folder)[-1]['eval_accuracy']
    assert len(costs({name: tmp_path/'few' for name in 'ab'}, 'toy', max_seq_len=20, rows=4, rounds=1)) == 2


def test_a_run_is_asked_with_rows_of_its_length(best, dev, tmp_path):
    """They were cut to 24 tokens in training, and are by default; for a model of no run it is 128."""
    long = [dict(row, sentence1=' '.join([row['sentence1']]*5)) for row in dev]
    assert (max_seq_len_of(best), max_seq_len_of(load_classifier(best))) == (24, 128)
    for place in (best, best/'checkpoint-12'):
        said = {S: {} for S in (None, 24, 60)}
        for S in said: evaluate(place, 'toy', rows=long, max_seq_len=S, answers=said[S], device_id=-1)
        logits = {S: found['rows'][1] for S, found in said.items()}
        assert (logits[None] == logits[24]).all() and (logits[None] != logits[60]).any()
        files = [write_predictions(place, 'toy', tmp_path/str(S), max_seq_len=S, rows=long, device_id=-1)[0]
                 for S in (None, 24)]
        assert files[0].read_text() == files[1].read_text()
    assert len(costs(dict(ours=best), 'toy', rows=4, rounds=1)) == 1


def test_a_held_run_is_scored_on_the_rows_of_its_folder(base, dev, tmp_path, monkeypatch):
    """Its plan names that folder as seen from the experiments, not from where the program runs."""
    monkeypatch.chdir(tmp_path)
    try:
        write_task('pairs', 'rows', get_task('toy').labels, train=load_task('toy', size=40), dev=dev)
        recipe = base.replace(task='pairs', data_dir='rows', train_size=None)
        with Stepper(recipe, 'experiments') as held:
            held.step()
            assert held.trainer.description['recipe']['data_dir'] == '../rows'
            scores = held.score()
            assert held.score(rows=dev) == scores == held.score(data_dir='rows')
    finally: tasks.pop('pairs', None)
