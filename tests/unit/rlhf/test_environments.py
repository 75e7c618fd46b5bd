"""Environments: what they answer; conversations whose observations are read and not learnt, by hand."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes.data.tokenizers import TrainTokenizer
from recipes.errors import RequestError, StageError
from recipes.stages.environments import CalculatorEnvironment, PythonDocsEnvironment, PythonEnvironment
from rlhf.algorithms.advantages import Gae, GroupRelative, Rewarded, WhitenedReturns
from rlhf.environments.calculator import Calculator, CalculatorError, evaluate, written
from rlhf.environments.open import environment_finding, open_environment
from rlhf.environments.protocol import Step
from rlhf.environments.python_docs import look_up
from rlhf.text.episodes import Episodes, Observer
from rlhf.text.samples import Sample, collate, earlier_rewards, pack, unpack
from trainers.data.batches import PromptBatch
from trainers.data.tokenizer import Tokenization, train_tokenizer
from trainers.inference.rollouts import Sampled, SampleKey, StopReason, WeightsVersion

TOOL = CalculatorEnvironment(name="calculator", opening="calc ", closing=";", shown=" {}", turns=3)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("47+38", "85"), ("2*(3-10)", "-14"), ("1/4", "0.25"), ("2/3", "2/3"), ("0.1+0.2", "0.3"), ("7//2", "3"),
        ("-7 % 3", "2"), ("2**10", "1024"), ("2**-2", "0.25"), ("1/400", "0.0025"), ("10/4", "2.5"), ("1e3*3", "3000"),
        ("-1/8", "-0.125"), ("100", "100"), ("99999999999999999999*3", "299999999999999999997"),
    ],
)  # fmt: skip
def test_arithmetic_is_exact(expression: str, value: str) -> None:
    assert written(evaluate(expression)) == value


@pytest.mark.parametrize(
    "expression",
    ["", "1/0", "9**99", "9**9**9", "a+1", "__import__('os')", "1+", "(1", "True+1", "[1]", "1 if 1 else 2", "1" * 300,
     "2**0.5", "(2**64)**4", "1e99", "abs(-1)", "'a'*9"],
)  # fmt: skip
def test_what_is_no_arithmetic_is_refused(expression: str) -> None:
    with pytest.raises(CalculatorError):
        evaluate(expression)
    assert "error" in Calculator(TOOL).step(f"calc {expression};").observation


def test_a_turn_calls_a_tool_or_is_the_last_one() -> None:
    calculator = Calculator(TOOL)
    assert calculator.reset({}) == ""
    assert calculator.step("so calc 1+1; or calc 2+3; then") == Step(" 5")
    assert calculator.step("calc 4*4") == Step(" 16")
    assert calculator.step("the answer is 16") == Step(done=True)


def test_python_explains_itself() -> None:
    assert look_up("str.join").startswith("str.join(self, iterable, /): Concatenate any number of strings.")
    assert look_up("math.gcd") == "math.gcd(*integers): Greatest Common Divisor."
    assert look_up("os.path").startswith("os.path")
    assert look_up("collections.OrderedDict.move_to_end").count("\n") >= 1
    for unknown in ("numpy.array", "no_such_name", "os.no", "antigravity", "this", "1+1", ""):
        assert "document" in look_up(unknown) or "no name" in look_up(unknown)
    made = open_environment(PythonDocsEnvironment(name="python_docs"), Path())()
    assert made.step("<call>math.gcd</call>").observation == look_up("math.gcd")


OWN = """
from rlhf.environments.protocol import Step


class Countdown:
    def reset(self, row):
        self.left = row["from"]
        return f" from {self.left}"

    def step(self, action):
        if "boom" in action:
            raise ValueError("boom was said")
        self.left -= 1
        return Step(f" {self.left}", reward=0.5, done=self.left == 0)
"""


def test_an_environment_of_the_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "games.py").write_text(OWN)
    spec = PythonEnvironment(name="python", python="games:Countdown", columns=["from"])
    assert environment_finding(spec, tmp_path) is None
    missing = environment_finding(spec.model_copy(update={"python": "games:Countup"}), tmp_path)
    assert missing is not None
    assert "Countup" in missing.message
    with pytest.raises(RequestError, match="Countup"):
        open_environment(spec.model_copy(update={"python": "games:Countup"}), tmp_path)
    one, other = open_environment(spec, tmp_path)(), open_environment(spec, tmp_path)()
    assert (one.reset({"from": 2}), other.reset({"from": 9})) == (" from 2", " from 9")
    assert [one.step(""), one.step("")] == [Step(" 1", 0.5), Step(" 0", 0.5, done=True)]


@pytest.fixture(scope="module")
def tokenization() -> Tokenization:
    return train_tokenizer(TrainTokenizer(train="bpe", vocab_size=300), ["calc 1+1; 2 answer 2"])


class Scripted:
    """Draws given turns, so that what becomes of them can be counted by hand."""

    def __init__(self, turns: Sequence[Sequence[list[int]]], reasons: Sequence[Sequence[StopReason]]) -> None:
        self._turns, self._reasons = turns, reasons
        self.asked: list[tuple[list[list[int]], list[SampleKey]]] = []

    def __call__(self, prompts: PromptBatch, keys: Sequence[SampleKey]) -> Sampled:
        seen = [ids[real].tolist() for ids, real in zip(prompts.input_ids_BP, prompts.attention_mask_BP, strict=True)]
        turn = len(self.asked)
        self.asked.append((seen, list(keys)))
        written, width = self._turns[turn], max(map(len, self._turns[turn]))
        tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in written])
        mask = torch.arange(width)[None] < torch.tensor([[len(ids)] for ids in written])
        return Sampled(tokens, mask, -0.5 * mask.float(), tuple(self._reasons[turn]), WeightsVersion(0, 0))


def begun(ids: list[int], row: int) -> Sample:
    nothing = np.empty(0, dtype=np.float32)
    mask = np.zeros(len(ids), dtype=np.bool_)
    return Sample(str(row), row, 0, np.array(ids, dtype=np.int32), mask, nothing, "length", WeightsVersion(-1, -1), "")


def test_observations_are_read_and_not_learnt(tokenization: Tokenization) -> None:
    """Row 0 calls and answers, row 1 answers at once, row 2 is cut off, row 3 calls as long as it may."""
    encode, end = tokenization.encode, tokenization.eos_id
    prompt, call, answer = encode("1+2:"), encode(" calc 1+2;"), [*encode(" answer 3"), end]
    told = encode(" 3")
    script = Scripted(
        [[call, answer, call, call], [answer, call], [call]],
        [["stop", "stop", "length", "stop"], ["stop", "stop"], ["stop"]],
    )
    records = [{"prompt": "1+2:"}] * 4
    episodes = Episodes(TOOL, lambda: Calculator(TOOL), Observer(tokenization, "user", 8), records)
    samples = episodes.play([begun(prompt, row) for row in range(4)], script)

    assert samples[0].tokens.tolist() == [*prompt, *call, *told, *answer]
    spans = [len(prompt) * [False], len(call) * [True], len(told) * [False], len(answer) * [True]]
    assert samples[0].actions.tolist() == [flag for span in spans for flag in span]
    assert len(samples[0].logprobs) == len(call) + len(answer)
    assert [s.text.strip() for s in samples] == ["answer 3", "answer 3", "calc 1+2;", "calc 1+2;"]
    assert [s.stop_reason for s in samples] == ["stop", "stop", "length", "turns"]
    assert samples[3].action_ids == call * 3
    assert [keys for _, keys in script.asked] == [[(row, 0) for row in range(4)], [(0, 0, 1), (3, 0, 1)], [(3, 0, 2)]]
    assert script.asked[1][0][0] == [*prompt, *call, *told]
    batch = collate(samples, tokenization.pad_id)
    assert batch.ended_B.tolist() == [True, True, False, False]
    assert batch.action_mask_BA.sum(dim=1).tolist() == [len(s.logprobs) for s in samples]
    assert [one.differences(other) for one, other in zip(unpack(pack(samples)), samples, strict=True)] == [[]] * 4


def test_the_longest_observation_is_cut(tokenization: Tokenization) -> None:
    observer = Observer(tokenization, "user", 4)
    whole = tokenization.encode("123456789")
    assert observer.tokens("1+2:", [5], "123456789") == whole[:4]
    chat = [{"role": "user", "content": "1+2"}]
    room = len(Observer(tokenization, "user", 99).tokens(chat, [], ""))
    cut = Observer(tokenization, "user", room + 2).tokens(chat, [], "123456789")
    assert len(cut) == room + 2
    with pytest.raises(StageError):
        Observer(tokenization, "user", room - 1).tokens(chat, [], "1")


def test_a_conversation_is_the_one_that_the_template_writes(tokenization: Tokenization) -> None:
    """Tokens of prompt, turn and observation together are those of the whole conversation."""
    asked: list[Any] = [{"role": "user", "content": "1+2"}]
    answered: list[Any] = [*asked, {"role": "assistant", "content": "calc 1+2;"}]
    told = [*answered, {"role": "user", "content": "3"}]
    prompt = tokenization.encode(tokenization.render(asked, add_generation_prompt=True))
    turn = [*tokenization.encode("calc 1+2;"), tokenization.end_ids[0]]
    tail = Observer(tokenization, "user", 99).tokens(asked, turn, "3")
    assert [*prompt, *turn, *tail] == tokenization.encode(tokenization.render(told, add_generation_prompt=True))


def test_an_environment_rewards_turns(tokenization: Tokenization, tmp_path: Path) -> None:
    (tmp_path / "games.py").write_text(OWN)
    spec = PythonEnvironment(name="python", python="games:Countdown", columns=["from"], turns=5)
    records = [{"prompt": "go", "columns": {"from": 2}}, {"prompt": "go", "columns": {"from": 1}}]
    episodes = Episodes(spec, open_environment(spec, tmp_path), Observer(tokenization, "user", 8), records)
    a, b, prompt = tokenization.encode("a"), tokenization.encode("bb"), tokenization.encode("go")
    script = Scripted([[a, b], [b]], [["stop", "stop"], ["stop"]])
    first, second = episodes.play([begun(prompt, 0), begun(prompt, 1)], script)
    opening = tokenization.encode(" from 2")
    assert first.tokens.tolist() == [*prompt, *opening, *a, *tokenization.encode(" 1"), *b]
    assert first.turn_rewards == ((len(a), 0.5), (len(a) + len(b), 0.5))
    assert (first.rewards, second.rewards) == ({"environment": 1.0}, {"environment": 0.5})
    table = earlier_rewards([first, second])
    assert table.tolist() == [[0.5, *[0.0] * len(b)], [0.0] * (len(a) + len(b))]
    with pytest.raises(StageError, match="boom"):
        episodes.play([begun(prompt, 0)], Scripted([[tokenization.encode("boom")]], [["stop"]]))


def test_credit_of_turns_by_hand() -> None:
    """Actions 1 | 2 3: 0.5 was given after the first, of a score of 2; values 0. gamma 1/2, lambda 1.

    Rewards 0.5, 0, 1.5; returns from the end 1.5, 0.75, 0.5 + 0.375 = 0.875. Comparisons know totals alone: 2 and 1.
    """
    mask, zeros = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3)
    earlier = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    one = torch.ones(2, dtype=torch.bool)
    rewarded = Rewarded(torch.tensor([2.0, 1.0]), zeros, 0.0, mask, zeros, torch.tensor([7, 7]), one, earlier)
    assert rewarded.rewards_NA.tolist() == [[0.5, 0.0, 1.5], [0.0, 0.0, 1.0]]
    returns_NA = Gae(0.5, 1.0)(rewarded).returns_NA
    assert returns_NA is not None
    assert returns_NA.tolist() == [[0.875, 0.75, 1.5], [0.25, 0.5, 1.0]]
    assert GroupRelative("none")(rewarded).advantages_NA.tolist() == [[0.5] * 3, [-0.5] * 3]
    whitened = WhitenedReturns(0.5, by_group=False)(rewarded).advantages_NA
    expected = (returns_NA - returns_NA.mean()) / returns_NA.std(correction=0)
    torch.testing.assert_close(whitened, expected, atol=1e-6, rtol=1e-5)


Build = Callable[..., Any]


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_policies_learn_from_conversations(tiny_ppo: Build, tokenization: Tokenization, name: str) -> None:
    """Real draws: equal again from equal keys, ratio 1 in the first step, observations are no actions."""
    sizes = {"vocabulary": tokenization.vocab_size}
    tiny = tiny_ppo(name=name, samples=2, sizes=sizes, iterations=1, max_new_tokens=4, lora=False, epochs=1)
    policy = tiny.source.experience.policy
    policy.reward = replace(policy.reward, weights={"judge": 1.0, "environment": 1.0})

    class Echo:
        def reset(self, row: Any) -> str:
            return ""

        def step(self, action: str) -> Step:
            return Step("1+1", reward=float(len(action) % 2))

    records = [{"prompt": "x"}] * 40
    policy.sampling = replace(policy.sampling, stop_ids=tuple(range(0, tokenization.vocab_size, 2)))
    policy.episodes = Episodes(TOOL, Echo, Observer(tokenization, "user", 8), records)
    policy.sync(0)
    first, again = (policy.sample(0, lambda share: None).records for _ in range(2))
    assert [one.differences(other) for one, other in zip(first, again, strict=True)] == [[]] * len(first)
    assert any(len(sample.turn_rewards) > 1 for sample in first)
    sums = tiny.run()
    assert all(np.isfinite(step["loss"]) for step in sums)
    batch = tiny.source.experience.policy.collated(first).samples
    assert sums[0]["log_ratio"] == pytest.approx(0.0, abs=1e-4)
    assert int(batch.action_mask_BT.sum()) == sum(len(sample.logprobs) for sample in first)
