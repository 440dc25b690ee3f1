"""Speed is kept: ratios within one process, with wide margins; seconds would depend on the machine."""
import pytest

from lad_nb.benchmark import benchmark


@pytest.mark.slow
def test_exact_mode_beats_the_plain_loop_and_the_cache_beats_both():
    modes = ('plain', 'exact', 'fast_cached')
    found = benchmark('minilm', rounds=3, updates=1, rows=16, task='toy', max_seq_len=128, batch_size=8,
                      modes=modes, device_id=-1)
    ratios = {mode: r['median'] for mode, r in found['ratios'].items()}
    assert ratios['exact'] > 1.1, f"exact mode must be 1.1 times as fast as the plain loop: {found['ratios']}"
    assert ratios['fast_cached'] > 2*ratios['exact'], (
        f"rows of some 20 tokens were padded to 128, or the teacher was asked: {found['ratios']}")
