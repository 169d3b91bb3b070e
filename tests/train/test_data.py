"""Reading and splitting data, and what is said of data that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graftwork.train import corpus, data, examples, tasks
from graftwork.train.columns import Columns
from graftwork.train.recipe import RecipeError, build
from train import toys

ROWS = [("NA", "good"), ("null", "bad"), ('a "quoted word', "good"), ("line", "bad")]
WANTED = [{"text": text, "label": label} for text, label in ROWS]


def recipe(**settings: Any) -> Any:
    return build({"model": "m", **settings})[0]


@pytest.mark.parametrize("suffix", ["tsv", "jsonl", "json", "parquet"])
def test_every_format_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"d.{suffix}"
    if suffix in ("tsv", "jsonl"):
        toys.write_table(file, ROWS, ("text", "label"))
    elif suffix == "json":
        import json

        file.write_text(json.dumps(WANTED))
    else:
        import pandas

        pandas.DataFrame(WANTED).to_parquet(file)
    assert list(data.load(str(file))["train"]) == WANTED


def test_csv_keeps_words_that_look_like_nothing(tmp_path: Path) -> None:
    file = tmp_path / "d.csv"
    file.write_text('text,label\nNA,None\n"a, b ""c""",nan\n')
    rows = data.load(str(file))["train"]
    assert list(rows) == [
        {"text": "NA", "label": "None"}, {"text": 'a, b "c"', "label": "nan"},
    ]  # fmt: skip


def test_a_folder_has_parts(tmp_path: Path) -> None:
    for name, count in (("train-1", 3), ("train-2", 2), ("dev", 1), ("test", 4)):
        toys.write_table(tmp_path / f"{name}.csv", toys.reviews(count), ("text", "label"))
    (tmp_path / "README.md").write_text("not data")
    parts = data.load(str(tmp_path))
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 5, "test": 4}
    assert len(data.load_rows(str(tmp_path))) == 4


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list(WANTED)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "two")
    assert list(data.load(str(tmp_path / "one"))["train"]) == WANTED
    assert set(data.load(str(tmp_path / "two"))) == {"train", "test"}


def write(path: Path, text: str) -> None:
    path.write_text(text)


UNREADABLE = {
    "an empty file": ("d.csv", "", r"is empty \(0 bytes\)"),
    "only a heading": ("d.csv", "text,label\n", "no rows below its heading"),
    "an unknown kind": ("d.xlsx", "x", r"ends in \.xlsx; data is read from \.csv"),
    "broken json": ("d.jsonl", '{"text": "a"}\n{"text": ', "cannot be read: "),
    "rows of unequal width": ("d.csv", "a,b\n1,2\n1,2,3\n", "cannot be read: .*line 3"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_data_is_explained(name: str, tmp_path: Path) -> None:
    file, content, text = UNREADABLE[name]
    write(tmp_path / file, content)
    with pytest.raises(RecipeError, match=text):
        data.load(str(tmp_path / file))


def test_data_that_is_not_there_is_explained(tmp_path: Path) -> None:
    write(tmp_path / "reviews.csv", "x")
    with pytest.raises(RecipeError, match=r"no data at .*review\.csv; did you mean 'reviews\.csv'"):
        data.load(str(tmp_path / "review.csv"))
    with pytest.raises(RecipeError, match="there is no folder"):
        data.load(str(tmp_path / "nowhere" / "review.csv"))
    with pytest.raises(RecipeError, match="holds no data file"):
        (tmp_path / "empty").mkdir()
        data.load(str(tmp_path / "empty"))
    with pytest.raises(RecipeError, match="the hub's data set some/thing cannot be read"):
        data.load("some/thing")


@pytest.mark.parametrize("seed", range(5))
def test_a_split_parts_all_rows_and_keeps_every_class(seed: int) -> None:
    classes = [i % 7 if i < 70 else 7 for i in range(71)]
    train, test = data.split(71, 0.2, seed, classes)
    assert sorted(train + test) == list(range(71)) and not set(train) & set(test)
    assert {classes[i] for i in train} == set(range(8))
    assert [sum(classes[i] == c for i in test) for c in range(8)] == [2] * 7 + [0]
    assert data.split(71, 0.2, seed, classes) == (train, test)
    assert data.split(71, 0.2, seed + 1, classes) != (train, test)


def test_something_is_always_held_out() -> None:
    assert [len(part) for part in data.split(2, 0.1, 0)] == [1, 1]
    assert [len(part) for part in data.split(3, 0.1, 0, [0, 1, 2])] == [2, 1]


def test_drawing_is_by_the_seed() -> None:
    assert data.draw(10, None, 0) == list(range(10)) == data.draw(10, 99, 0)
    chosen = data.draw(100, 10, 1)
    assert len(set(chosen)) == 10 and chosen == data.draw(100, 10, 1) != data.draw(100, 10, 2)


# -- columns

KNOWN = {
    ("sentence", "label"): ("classification", {"text": "sentence", "label": "label"}),
    ("Text", "Category"): ("classification", {"text": "Text", "label": "Category"}),
    ("premise", "hypothesis", "label", "idx"): (
        "classification", {"text": "premise", "pair": "hypothesis", "label": "label"},
    ),
    ("instruction", "input", "output"): (
        "instruction", {"prompt": "instruction", "completion": "output", "input": "input"},
    ),
    ("instruction", "response"): (
        "instruction", {"prompt": "instruction", "completion": "response"},
    ),
    ("prompt", "completion"): ("instruction", {"prompt": "prompt", "completion": "completion"}),
    ("messages",): ("instruction", {"messages": "messages"}),
    ("text",): ("language", {"text": "text"}),
}  # fmt: skip


@pytest.mark.parametrize("present", KNOWN)
def test_columns_are_recognised(present: tuple[str, ...]) -> None:
    name, roles = KNOWN[present]
    task, of = tasks.choose(recipe(data="d"), present, "d.csv")
    assert (task.name, of.of) == (name, roles)


def test_named_columns_decide() -> None:
    told = recipe(data="d", prompt_column="mr", completion_column="ref")
    task, of = tasks.choose(told, ("mr", "ref", "text", "label"), "d.csv")
    assert (task.name, of.of) == ("instruction", {"prompt": "mr", "completion": "ref"})


def test_columns_that_do_not_fit_are_explained() -> None:
    with pytest.raises(RecipeError, match=r"no column 'sentance'; did you mean 'sentence'.*label"):
        tasks.choose(recipe(data="d", text_column="sentance"), ("sentence", "label"), "d.csv")
    with pytest.raises(RecipeError, match="columns a, b, which fit no task"):
        tasks.choose(recipe(data="d"), ("a", "b"), "d.csv")
    with pytest.raises(RecipeError, match=r"columns a, b; classification needs .*--text-column a"):
        tasks.choose(recipe(data="d", task="classification"), ("a", "b"), "d.csv")
    with pytest.raises(RecipeError, match=r"no task 'clasification'.*'classification'"):
        tasks.choose(recipe(data="d", task="clasification"), ("a", "b"), "d.csv")


# -- examples

TEXTS = Columns("text + label", {"text": "text", "label": "label"})


def test_bad_rows_are_counted_shown_and_stop() -> None:
    rows = [*WANTED, {"text": " ", "label": "good"}, {"text": "x", "label": None}]
    found = examples.texts(rows, TEXTS)
    with pytest.raises(RecipeError) as caught:
        examples.usable(found, "d.csv", skip=False)
    text = str(caught.value)
    assert "2 of 6 rows of d.csv cannot be used" in text
    assert "row 5: text is empty" in text and "row 6: label is empty" in text
    assert "--skip-bad-rows" in text
    good, left_out = examples.usable(found, "d.csv", skip=True)
    assert (len(good), left_out) == (4, 2)
    with pytest.raises(RecipeError, match="Are these the right columns"):
        examples.usable(found[4:], "d.csv", skip=True)


def test_labels_become_words() -> None:
    rows = [{"text": "a", "label": v} for v in (1, True, 2.0, "x ")]
    assert [e.label for e in examples.texts(rows, TEXTS)] == ["1", "True", "2", "x"]
    bad = examples.texts([{"text": "a", "label": v} for v in (0.5, float("nan"))], TEXTS)
    assert ["a measure and no class" in str(bad[0]), str(bad[1])] == [True, "label is empty"]


def test_class_names_are_used() -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    first, second = examples.texts(rows, TEXTS)
    assert first.label == "yes" and "stands for no class" in str(second)


def test_conversations_are_read_in_both_dialects() -> None:
    of = Columns("messages", {"messages": "m"})
    rows = [
        {"m": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {"m": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        {"m": [{"role": "user", "content": "hi"}]},
        {"m": []},
    ]
    one, two, three, four = examples.dialogues(rows, of)
    assert one == two == (examples.Turn("user", "hi"), examples.Turn("assistant", "yo"))
    assert "no message of an assistant" in str(three) and "no list of messages" in str(four)


# -- corpora


def test_held_out_examples_that_occur_in_training_are_mentioned(tmp_path: Path) -> None:
    rows = toys.reviews(30)
    toys.write_table(tmp_path / "train.csv", rows, ("text", "label"))
    toys.write_table(tmp_path / "test.csv", [*rows[:2], ("new", "good")], ("text", "label"))
    found = corpus.gather(recipe(data=tmp_path))
    assert "2 of 3 held-out examples also occur in training" in found.remarks
    assert found.held.startswith("the test part of")


def test_held_out_data_needs_the_same_columns(tmp_path: Path) -> None:
    toys.write_table(tmp_path / "a.csv", toys.reviews(9), ("text", "label"))
    toys.write_table(tmp_path / "b.csv", toys.reviews(9), ("text", "stars"))
    told = recipe(data=tmp_path / "a.csv", test_data=tmp_path / "b.csv")
    with pytest.raises(RecipeError, match=r"b\.csv lacks the column label; it has text, stars"):
        corpus.gather(told)


def test_a_column_of_texts_is_no_label(tmp_path: Path) -> None:
    rows = [(f"text {i}", f"answer {i}") for i in range(40)]
    toys.write_table(tmp_path / "a.csv", rows, ("text", "label"))
    found = corpus.gather(recipe(data=tmp_path / "a.csv"))
    with pytest.raises(RecipeError, match="holds texts or measures rather than labels"):
        found.task.spec(found.columns, recipe(data="d"), None, found.train)
    same = [examples.Text("a", None, "x"), examples.Text("b", None, "x")]
    with pytest.raises(RecipeError, match="every row has the same label"):
        found.task.spec(found.columns, recipe(data="d"), None, same)


def test_labels_that_training_lacks_are_named() -> None:
    task = tasks.TASKS["classification"]
    spec = tasks.Spec("classification", "text + label", {}, 8, ("bad", "good"))
    found = [examples.Text("a", None, "goood"), examples.Text("b", None, "mixed")]
    with pytest.raises(RecipeError) as caught:
        task.encode(found, spec, None, "test.csv")
    text = str(caught.value)
    assert "test.csv has 2 labels that training does not" in text
    assert "'goood' (1 rows), 'mixed' (1 rows); did you mean 'good'" in text
    assert "Training has 2: bad, good" in text
