"""Samples, their order, and prompts with what is learnt of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from graftwork.train import examples, prompts, tasks
from graftwork.train.examples import Turn
from graftwork.train.recipe import RecipeError
from graftwork.train.samples import IGNORED, ByLength, Sample, Samples, collate, in_batches
from train import toys


@pytest.mark.parametrize("count", [1, 7, 8, 100, 513])
def test_an_order_holds_every_sample_once_and_follows_from_seed_and_epoch(count: int) -> None:
    lengths = [(i * 7919) % 50 + 1 for i in range(count)]
    order = ByLength(lengths, 8, seed=1)
    first = list(order)
    assert sorted(first) == list(range(count)) and len(order) == count
    assert list(order) == first
    order.set_epoch(1)
    again = list(order)
    assert count < 20 or again != first
    assert list(ByLength(lengths, 8, seed=1)) == first
    padded = sum(max(lengths[i] for i in first[s : s + 8]) for s in range(0, count, 8))
    assert padded <= sum(max(lengths[s : s + 8]) for s in range(0, count, 8))


def test_batches_are_padded_and_masked() -> None:
    batch = [Sample(np.array([5, 6, 7]), 1), Sample(np.array([8]), 0)]
    out = collate(batch, pad=9)
    assert out["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert out["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert out["labels"].tolist() == [1, 0] and "token_type_ids" not in out
    ids, labels = np.array([5, 6]), np.array([IGNORED, 6])
    out = collate([Sample(ids, labels), Sample(ids[:1], labels[1:])], pad=6)
    assert out["labels"].tolist() == [[IGNORED, 6], [6, IGNORED]]
    assert out["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_batches_by_length_hold_every_sample_once() -> None:
    samples = Samples([Sample(np.arange(n), 0) for n in (3, 1, 2, 5, 4)])
    rows = [row for chosen, _ in in_batches(samples, 2, 0) for row in chosen]
    assert rows == [1, 2, 0, 4, 3]


def learnt(ids: np.ndarray, labels: np.ndarray, words: Any) -> str:
    return str(words.decode(ids[labels != IGNORED].tolist()))


DIALOGUE = (Turn("user", "say good"), Turn("assistant", "good fine"))


def test_only_the_answer_is_learnt() -> None:
    words = toys.tokenizer("llama")
    ids, labels = prompts.encode(DIALOGUE, "{prompt}:", words)
    assert words.decode(ids.tolist()) == "<s> say good : good fine </s>"
    assert learnt(ids, labels, words) == "good fine </s>"
    assert (labels[labels != IGNORED] == ids[labels != IGNORED]).all()
    asked = prompts.question("say good", "{prompt}:", words)
    assert asked.tolist() == ids[: len(asked)].tolist()


def test_a_chat_template_decides_what_surrounds_an_answer() -> None:
    words = toys.tokenizer("llama")
    words.chat_template = (
        "{% for m in messages %}{{ m.role == 'user' and '# ' or '. ' }}{{ m.content }} , "
        "{% endfor %}{% if add_generation_prompt %}. {% endif %}"
    )
    assert prompts.choose(None, "messages", words) == prompts.CHAT
    assert prompts.choose(None, "prompt + completion", words) == "{prompt}\n"
    assert prompts.choose("Q: {prompt}\\nA:", "messages", words) == "Q: {prompt}\nA:"
    twice = (*DIALOGUE, Turn("user", "loud"), Turn("assistant", "great"))
    ids, labels = prompts.encode(twice, prompts.CHAT, words)
    assert words.decode(ids.tolist()) == "# say good , . good fine , # loud , . great ,"
    assert learnt(ids, labels, words) == "good fine , great ,"
    asked = prompts.question("say good", prompts.CHAT, words)
    assert asked.tolist() == ids[: len(asked)].tolist()


def test_a_template_that_hides_the_answer_is_refused() -> None:
    words = toys.tokenizer("llama")
    words.chat_template = "{% if add_generation_prompt %}#{% endif %}{{ messages[-1].content }}"
    with pytest.raises(RecipeError, match="nothing would be learnt; give a plain one: --template"):
        prompts.encode(DIALOGUE, prompts.CHAT, words)


@pytest.mark.parametrize("prompt", [0, 3, 8, 30])
@pytest.mark.parametrize("answer", [1, 4, 30])
def test_cutting_leaves_something_to_learn(prompt: int, answer: int) -> None:
    ids = np.arange(prompt + answer)
    labels = np.where(ids < prompt, IGNORED, ids)
    short, kept = prompts.fit(ids, labels, 10)
    assert len(short) == len(kept) == min(10, prompt + answer)
    assert kept[kept != IGNORED][0] == prompt  # the answer's first token
    if prompt + answer <= 10:
        assert (short == ids).all()


def test_long_plain_texts_are_cut_into_pieces_and_nothing_is_lost() -> None:
    words = toys.tokenizer("llama")
    task, spec = tasks.TASKS["language"], tasks.Spec("language", "text", {}, 4)
    found = task.encode([examples.Text("the film was good and the plot")], spec, words, "d")
    pieces = [s.ids.tolist() for s in found.samples.items]
    assert [len(p) for p in pieces] == [4, 4]  # a ninth token alone would teach nothing
    assert (found.long, found.longest) == (1, 9)
    assert words.decode([*pieces[0], *pieces[1]]) == "<s> the film was good and the plot"


def test_long_texts_for_a_label_are_counted_and_cut() -> None:
    words = toys.tokenizer("bert")
    task = tasks.TASKS["classification"]
    spec = tasks.Spec("classification", "text + label", {}, 5, ("bad", "good"))
    texts = [
        examples.Text("the film was very good", None, "good"),
        examples.Text("bad", None, "bad"),
    ]
    found = task.encode(texts, spec, words, "d")
    assert (found.long, found.longest) == (1, 7)
    assert [words.decode(s.ids.tolist()) for s in found.samples.items] == [
        "[CLS] the film was [SEP]", "[CLS] bad [SEP]",
    ]  # fmt: skip


def test_pairs_have_token_types() -> None:
    words = toys.tokenizer("bert")
    spec = tasks.Spec("classification", "pair + label", {}, 9, ("no", "yes"))
    found = tasks.TASKS["classification"].encode(
        [examples.Text("good film", "bad", "yes")], spec, words, "d"
    )
    assert found.samples[0].types.tolist() == [0, 0, 0, 0, 1, 1]  # type: ignore[union-attr]


def test_the_macro_average_is_sklearns() -> None:
    from sklearn.metrics import f1_score

    torch.manual_seed(0)
    found, wanted = torch.randint(4, (50,)), torch.randint(3, (50,))
    ours = tasks._macro_f1(found, wanted)
    theirs = f1_score(wanted, found, labels=[0, 1, 2], average="macro")
    assert ours == pytest.approx(theirs)
