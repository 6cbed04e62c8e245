"""What one rank cannot do ends all of them, and is told once."""

from __future__ import annotations

import pytest

from helpers.chains import RealChain


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> RealChain:
    return RealChain(tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
def test_a_batch_that_the_ranks_cannot_share_is_refused(chain: RealChain) -> None:
    _, err = chain.run("uneven", "launch.processes=2", "ppo.batch_episodes=9", code=2)
    assert err.count("Error:") == 1
    assert "ppo.batch_episodes=9: it cannot be divided equally over 2 ranks. Use 8 or 10." in err


@pytest.mark.slow
def test_one_ranks_exception_ends_the_others_and_is_shown_once(chain: RealChain) -> None:
    (chain.directory / "reward_of_rank0.py").write_text(
        "import os\n\nclass CrashError(BaseException):\n    pass\n\ndef score(prompts, responses):\n"
        "    if os.environ['RANK'] != '0':\n        raise CrashError('only here')\n"
        "    return [0.0] * len(responses)\n"
    )
    overrides = (
        "ppo.reward=python:reward_of_rank0:score", "ppo.critic.init=sft", "ppo.score.normalize=none"
    )  # fmt: skip
    _, err = chain.run("one_fails", *overrides, "launch.processes=2", code=1)
    assert err.count("CrashError: only here") == 1 and err.count("Traceback") == 1
    assert "Rank 1 failed first" in err
