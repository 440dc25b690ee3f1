"""Make SECURITY.md's table from the tests' own counts.

    pytest -m faults --counts tests/counts.jsonl          # the short form
    pytest --slow -m faults --counts tests/counts.jsonl   # the long form
    python tools/make_security.py

A test says how often it did something, and what was lost (`counted`, in tests/conftest.py); a test that says
nothing is counted by its parameters, as `passed`. A run replaces the counts of the tests that it ran, form by
form. Of a test that was counted in both forms the long one is shown.
"""
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).parents[1]
COUNTS = ROOT/'tests'/'counts.jsonl'
START, END = '<!-- counts: made by tools/make_security.py -->', '<!-- end of counts -->'


@dataclass(frozen=True)
class Row:
    "A fault: how it is tested, by which tests, and their numbers in words"
    fault: str
    how: str
    tests: str            # 'file.py::test', with spaces between: their numbers are added up
    times: str = '{passed}' # with the names of counts
    lost: str = '0'

    @property
    def names(self): return self.tests.split()


ROWS = [
    Row('SIGKILL at a random moment: by the clock, at a file operation, in the middle of a write, before and '
        'after a snapshot',
        'a study (a teacher, its cache, a run of 30 updates with a checkpoint every 5, its scores and '
        'snapshots, a line of results, a card), killed and started again until done; student, gates, log, '
        'card and its picture compared with an uninterrupted one\'s byte by byte, scores and snapshots as '
        'text',
        'test_faults.py::test_killed_at_random_moments',
        '{kills} kills in {studies} studies', '{bytes_lost} bytes, {results_lost} results'),
    Row('SIGKILL and SIGTERM at random moments to the parent of a study of two processes, started again at '
        'once',
        'tables and students against an uninterrupted study\'s; who is left of its processes',
        'test_studies.py::test_a_study_of_two_processes_killed_at_its_parent',
        '{kills} kills in {studies} studies', '{lines_lost} lines, none twice; no process'),
    Row('SIGINT, SIGTERM and SIGHUP to a command at random moments: before the first update, within one, '
        'while a checkpoint, the final student or the card is written; some three in a row',
        'one line, the shell\'s exit code, no traceback; resumed, compared byte by byte',
        'test_faults.py::test_signals_at_random_moments',
        '{signals} stops of {runs} runs, {three_in_a_row} of them by three signals', '{bytes_lost} bytes'),
    Row('SIGKILL while a checkpoint is written: after the weights, after the optimiser, before the rename',
        'resumed, compared byte by byte', 'test_faults.py::test_killed_while_a_checkpoint_is_written',
        '{passed}', '0 bytes'),
    Row('SIGKILL between the final files, when a run first ends and when it ends again',
        'found unfinished, resumed, compared', 'test_loading.py::test_killed_between_the_final_files'),
    Row('The newest checkpoint truncated, emptied, a bit flipped, a file missing: weights, optimiser, state, '
        'checksums',
        'named, set aside, resumed from the one before, compared byte by byte',
        'test_faults.py::test_a_damaged_checkpoint_is_named_and_set_aside '
        'test_faults.py::test_resumed_past_a_damaged_checkpoint',
        '{passed}', 'the updates since that one, computed again'),
    Row('SIGKILL at every shard of the teacher\'s cache; a damaged shard; two processes that build it',
        'completed; computed again; one builds, the other waits',
        'test_cache.py::test_killed_while_building test_loading.py::test_a_truncated_shard '
        'test_cache.py::test_two_processes_build_the_same_cache',
        '{kills} kills; {shards} shard; {builders} processes'),
    Row('A torn last line: log; results, at 8 lengths, before the next line comes',
        'left out on reading, cut off before the next line is added',
        'test_faults.py::test_a_log_with_a_torn_last_line '
        'test_faults.py::test_a_torn_result_is_not_glued_to_the_next', '{passed}', 'the torn line'),
    Row('A full disk (a real one, of 16 MB), filled up so that a run stops at its recipe, log, TensorBoard, '
        'checkpoint or last files',
        'error with path and bytes, checkpoints sound, resumed with room, compared byte by byte',
        'test_faults.py::test_a_disk_that_is_really_full',
        '{stops} stops', '{bytes_lost} bytes'),
    Row('The same for checkpoint, cache and table of results; a disk that is made read-only in the middle; a '
        'folder without permission', 'the same',
        'test_faults.py::test_a_full_disk test_faults.py::test_a_full_disk_and_the_cache '
        'test_faults.py::test_a_full_disk_and_the_results test_faults.py::test_a_read_only_folder '
        'test_faults.py::test_no_permission'),
    Row('Two processes (and two threads) start one experiment',
        'one trains, the other is told and changes nothing; the lock goes with its process',
        'test_faults.py::test_two_processes_start_the_same_experiment '
        'test_faults.py::test_two_that_start_at_the_same_moment', '{passed}'),
    Row('Two studies, also of two machines on a file system without locks, do the same runs',
        'shared; each run has one line, none is failed, what is held elsewhere is waited for',
        'test_studies.py::test_two_studies_at_once '
        'test_studies.py::test_a_run_that_another_holds '
        'test_studies.py::test_a_teacher_that_another_trains_holds_up_no_other '
        'test_studies.py::test_of_the_runs_that_are_waited_for_the_first_that_is_free_is_done '
        'test_studies.py::test_a_run_that_another_machine_has_on_a_file_system_without_locks '
        'test_studies.py::test_two_machines_do_one_study_on_a_file_system_without_locks '
        'test_studies.py::test_a_line_is_written_once', '{passed}', '0 lines'),
    Row('A folder of experiments, a run or a study that moves, is zipped, or loses its teacher or rows to '
        'others',
        'opened, gone on with and run again elsewhere; other teachers, encoders and rows refused by hash',
        'test_moves.py::test_a_moved_folder_of_experiments '
        'test_moves.py::test_zipped_and_unpacked_elsewhere '
        'test_moves.py::test_a_study_that_moves_in_the_middle '
        'test_moves.py::test_another_encoder_at_the_place_of_a_studys '
        'test_moves.py::test_a_run_that_is_copied_alone test_moves.py::test_a_teacher_that_moves_alone '
        'test_moves.py::test_another_teacher_at_its_place test_moves.py::test_another_encoder_at_its_place '
        'test_moves.py::test_other_training_rows test_moves.py::test_the_same_rows_from_another_place'),
    Row('A NaN or an infinity in a student layer, a gate, a teacher layer, one word\'s embedding, a gate\'s '
        'or a student\'s gradient, the weights before a checkpoint, the cache',
        'stops at that update; term, layer or gate and rows are named; nothing of it is written',
        'test_numbers.py::test_a_student_layer test_numbers.py::test_a_gate '
        'test_numbers.py::test_a_teacher_layer test_numbers.py::test_one_row_of_one_micro_batch '
        'test_numbers.py::test_a_gradient_without_a_loss '
        'test_numbers.py::test_a_student_gradient_without_a_loss '
        'test_numbers.py::test_weights_that_are_not_finite_are_not_written '
        'test_numbers.py::test_a_cache_of_states_that_are_not_finite',
        '{passed}', '0; the update is refused'),
    Row('A label outside the head; labels in another order; a teacher at chance',
        'refused; with both orders; a warning',
        'test_numbers.py::test_a_label_outside_the_head test_numbers.py::test_label_orders '
        'test_numbers.py::test_a_teacher_at_chance'),
    Row('TSV files as written, and harmed (quotes, tabs, line ends, marks, NUL, invalid UTF-8, huge fields, '
        'headers doubled, turned or cut, spaces in labels)',
        'hypothesis; against the rows that were written, and against another reader',
        'test_input.py::test_what_is_written_is_read '
        'test_input.py::test_what_is_harmed_is_read_right_or_refused',
        '{cases} files', '0 silent wrong rows'),
    Row('Recipes of others, and damaged `recipe.json`', 'hypothesis; read as what they say, or refused',
        'test_input.py::test_recipes_of_others test_input.py::test_damaged_descriptions', '{cases} cases'),
    Row('Plans: what a run says of itself, changed in one or two places, and gone on with',
        'hypothesis; refused, or a plan of the same teacher, encoder and rows that says the same when it is '
        'read back', 'test_mutated.py::test_plans_of_others', '{cases} cases'),
    Row('Flags of layers; saved mappings', 'hypothesis; against another reader; read as written, or refused',
        'test_input.py::test_mapping_flags test_input.py::test_mappings_of_others', '{cases} cases'),
    Row('`config.json` of a model, changed in one or two places',
        'hypothesis; refused by name, or a model of the sizes that were said, which answers',
        'test_mutated.py::test_configs_of_others', '{cases} cases'),
    Row('Values of a wrong type or size; models that nobody has; names and places without sense',
        'refused in words before anything is built, nothing written',
        'test_values.py::test_a_wrong_type_is_refused test_values.py::test_every_number_has_bounds '
        'test_values.py::test_sizes_that_cannot_work test_values.py::test_a_model_that_nobody_has '
        'test_values.py::test_twenty_nines test_values.py::test_what_is_no_place '
        'test_values.py::test_names_in_another_unicode_form '
        'test_values.py::test_flags_as_they_are_typed test_values.py::test_sizes_of_other_commands'),
    Row('Pickles that write a file when loaded, under nine names, in two forms, in a run and its checkpoints',
        'the file never appears; resuming is refused', 'test_security.py::test_a_poisoned_run_folder',
        '{pickles}', '{run} were run'),
    Row('A task.json that names files elsewhere; links out of a run, up to six levels down; links to files '
        'that are no data',
        'refused, nothing written through it, nothing of it quoted',
        'test_gifts.py::test_a_task_that_names_what_is_not_its_own test_gifts.py::test_a_link_at_any_depth '
        'test_security.py::test_a_link_out_of_a_run_folder '
        'test_security.py::test_a_link_to_a_file_that_is_no_data'),
    Row('Names that lead elsewhere, in 6 places, in Python and as flags', 'refused, nothing changed outside',
        'test_security.py::test_names_that_lead_elsewhere', '{names}'),
    Row('Models that ask for code', 'refused by all who load, nothing run',
        'test_security.py::test_a_model_that_asks_for_code', '{passed} models, {ways} loads',
        '{run} were run'),
    Row("A model's files: headers that say 2**60 bytes, settings nested 10,000 deep or of 1 GB, code asked "
        'for in eight families and seven ways, names that would repaint a terminal',
        'refused by all who load, by name, before it is read; nothing run',
        'test_hostile.py::test_headers_that_lie test_hostile.py::test_settings_that_are_nested '
        'test_hostile.py::test_settings_that_are_long test_hostile.py::test_families_that_ask_for_code '
        'test_hostile.py::test_code_that_nobody_looks_for '
        'test_hostile.py::test_messages_that_would_repaint_a_terminal', '{tried} cases'),
    Row('Rows: labels that are NaN, infinite or tables, nested features, texts with half a character; '
        'HTML, scripts and terminal escapes in sentences and in what a card says',
        'refused by row, or shown as text in panel, page, printed record and card',
        'test_hostile.py::test_labels_and_texts_that_are_none '
        'test_hostile.py::test_datasets_with_nested_features test_hostile.py::test_the_panel_shows_text '
        'test_hostile.py::test_a_page_of_its_own_shows_text '
        'test_hostile.py::test_a_card_of_somebody_elses_run '
        'test_hostile.py::test_a_run_folder_with_a_name_of_somebody_else', '{tried} cases'),
    Row('A push to a hub (a server here): names that are patterns, files that change meanwhile, links, '
        'answers and addresses that say the token',
        'what arrives was listed; the token is in no output, message, log, card or file',
        'test_hostile.py::test_what_is_sent_was_listed '
        'test_hostile.py::test_a_folder_that_changes_while_it_is_sent '
        'test_hostile.py::test_a_link_among_the_files test_hostile.py::test_the_token_is_not_told '
        'test_hostile.py::test_a_token_that_is_none', '{tried} cases', '0 files, 0 tokens'),
    Row('Workers of an executor that die, hang, return a line twice or that of another run',
        'an error for each job that is lost, Ctrl-C gets out, one line kept',
        'test_hostile.py::test_a_worker_that_dies test_hostile.py::test_a_worker_that_hangs '
        'test_hostile.py::test_a_line_that_comes_twice_in_short', '{tried} cases', '0 lines'),
    Row('Hostile recipes and descriptions in a run that somebody sent', 'refused, nothing changed',
        'test_security.py::test_hostile_recipes test_security.py::test_a_description_that_is_none '
        'test_security.py::test_a_run_that_names_a_teacher_elsewhere '
        'test_moves.py::test_descriptions_of_others'),
    Row('Many updates in a Stepper, scored, saved and written as a page (HTML) ten times, with cards at the '
        'end',
        'memory by a straight line, file handles, threads; the newest 3 checkpoints stay',
        'test_soak.py::test_many_updates',
        '{updates} updates, {scores} scores, {pages} pages, {cards} cards',
        '{handles_lost} file handles; {bytes_an_update} bytes of memory an update ({rss_from_mb} to '
        '{rss_to_mb} MB)'),
]


def counted(path=COUNTS):
    "The counts of the table's tests, which is all that the file needs to keep"
    wanted = {name for row in ROWS for name in row.names}
    lines = map(json.loads, path.read_text(encoding='utf-8').splitlines())
    return [line for line in lines if line['test'] in wanted]


def counts(lines):
    "{test: its numbers}, in the long form where there is one; `ValueError` for a test that failed"
    found = {}
    for line in lines:
        if line.get('failed') or line.get('error'):
            raise ValueError(f"{line['test']} failed in its {line['form']} form: mend it and count again.")
        if line['form'] == 'long' or line['test'] not in found: found[line['test']] = line
    return found


class Said(dict):
    "Numbers in words; what only the long form counts is not there in the short one"
    def __missing__(self, name): return 'uncounted'


def told(row, found):
    "A row's times, losses, and where its numbers are from"
    lines = [found[test] for test in row.names if test in found]
    left = len(row.names) - len(lines)
    if not lines: raise ValueError(f"Not counted yet: {row.tests}.")
    numbers = sum((Counter({k: v for k, v in line.items() if type(v) is int}) for line in lines), Counter())
    said = Said({k: '0' for line in lines for k, v in line.items() if v == 0})
    said.update({k: f'{n:,}' for k, n in numbers.items()})
    long = all(line['form'] == 'long' for line in lines)
    seeds = sorted({line['seed'] for line in lines if line['form'] == 'long'})
    where = f"long, seed {', '.join(map(str, seeds))}" if long else 'short'
    if left: where += f", without {left} of its tests"
    return row.times.format_map(said), row.lost.format_map(said), where


def table(kept):
    "The table, and what it was counted with"
    found = counts(kept)
    lines = ['| Fault | How it is tested | Times | Lost | Counted |', '|---|---|---|---|---|']
    lines += [f"| {row.fault} | {row.how} | {' | '.join(told(row, found))} |" for row in ROWS]
    used = [found[test] for row in ROWS for test in row.names if test in found]
    dates, versions = sorted({l['date'] for l in used}), used[-1]['versions']
    said = ', '.join(f'{name} {v}' for name, v in versions.items())
    minutes = {form: sum(l['seconds'] for l in kept if l['form'] == form)/60 for form in ('short', 'long')}
    took = ', '.join(f'{m:.0f} minutes in the {form} form' for form, m in minutes.items() if m)
    about = (f"Counted {' to '.join(dict.fromkeys((dates[0], dates[-1])))} with {said}, in {took}. "
             "The short form always has the seed 7; `LAD_NB_SEED` repeats the long one.")
    return '\n'.join([START, *lines, '', *wrap(about, 110), END])


def security():
    "SECURITY.md with the table of the counts"
    text = (ROOT/'SECURITY.md').read_text(encoding='utf-8')
    before, _, rest = text.partition(START)
    return before + table(counted()) + rest.partition(END)[2]


if __name__ == '__main__':
    lines = counted()
    (ROOT/'SECURITY.md').write_text(security(), encoding='utf-8')
    COUNTS.write_text(''.join(json.dumps(line) + '\n' for line in lines), encoding='utf-8')
