"""Built-in tasks: data files are read as they are meant or refused by line, and models are those of the checkpoints."""

import gzip
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cqr_compress as cqr
from cqr_compress.errors import TaskError
from cqr_compress.finetuning.task import Task
from cqr_compress.tasks import sasrec as sequences
from cqr_compress.tasks.data import files as files_module
from cqr_compress.tasks.data.files import DataOptions, ExampleFiles
from cqr_compress.tasks.data.readers import heading, read_blocks, read_libfm
from cqr_compress.tasks.metrics import auc, click_metrics, ranking_metrics, target_ranks
from cqr_compress.tasks.registry import BUILTIN, builtin_task

USERS, ITEMS, D = 40, 60, 8


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def clicks_text(separator: str = ",", names: str = "user,item,label", count: int = 500) -> str:
    generator = torch.Generator().manual_seed(3)
    user = torch.randint(USERS, (count,), generator=generator).tolist()
    item = torch.randint(ITEMS, (count,), generator=generator).tolist()
    rows = [names.replace(",", separator)] if names else []
    rows += [separator.join(map(str, (u, i, (u + i) % 2))) for u, i in zip(user, item, strict=True)]
    return "\n".join(rows) + "\n"


def small_file(folder: Path, state: dict[str, Tensor], tables: list[str]) -> Path:
    torch.save(state, folder / "ckpt.pt")
    request = cqr.ConvertOptions(method="pq", num_columns=4, n_bits=4, min_rows=0)
    cqr.convert(folder / "ckpt.pt", folder / "small.safetensors", request, tables=tables, force=True)
    return folder / "small.safetensors"


def pair_file(folder: Path, **more: Tensor) -> Path:
    generator = torch.Generator().manual_seed(4)
    state = {
        "user_emb.weight": torch.randn(USERS, D, generator=generator),
        "item_emb.weight": torch.randn(ITEMS, D, generator=generator),
    }
    return small_file(folder, state | more, ["user_emb.weight", "item_emb.weight"])


def options(*train: Path, **more: Any) -> DataOptions:
    held_out = more.pop("held_out", ())
    return DataOptions(train, tuple(held_out), more.pop("batch_size", 64), {k: str(v) for k, v in more.items()})


def tuned(task: Task, small: Path) -> dict[str, float]:
    """Two steps of fine-tuning: the metrics before."""
    report = cqr.finetune(
        small, small.with_suffix(".tuned.safetensors"), task, cqr.FinetuneOptions(max_steps=2), force=True
    )
    assert report.steps == 2
    return report.before


# files


@pytest.mark.parametrize(
    ("name", "separator", "names"),
    [
        ("c.csv", ",", "user,item,label"), ("c.tsv", "\t", "user,item,label"), ("c.csv.gz", ",", "user,item,label"),
        ("c.inter", "\t", "user_id:token,item_id:token,label:float"), ("c.csv", ",", ""), ("c.txt.gz", "\t", ""),
    ],
)  # fmt: skip
def test_text_files_say_the_same_in_every_form(tmp_path: Path, name: str, separator: str, names: str) -> None:
    small = pair_file(tmp_path)
    plain = write(tmp_path / "plain.csv", clicks_text())
    other = write(tmp_path / name, clicks_text(separator, names))
    wanted, found = (list(builtin_task("gmf", small, options(path)).train_batches(0)) for path in (plain, other))
    assert sum(len(batch[0]) for batch in found) == 450
    for part in range(3):
        joined = [torch.cat([batch[part] for batch in batches]).sort().values for batches in (wanted, found)]
        assert torch.equal(*joined)


def test_parquet_files_are_read_or_the_extra_is_named(tmp_path: Path) -> None:
    small = pair_file(tmp_path)
    path = tmp_path / "clicks.parquet"
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(TaskError, match=r"pip install 'cqr-compress\[parquet\]'"):
            builtin_task("gmf", small, options(path)).train_batches(0).__iter__().__next__()  # type: ignore[attr-defined]
        return
    columns = {"label": [1, 0, 1, 1], "item_id": [5, 6, 7, 59], "user_id": [0, 1, 2, 39]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    task = builtin_task("gmf", small, options(path, held_out=[path]))
    (user, item, label), *rest = task.train_batches(0)
    assert not rest and sorted(zip(user.tolist(), item.tolist(), label.tolist(), strict=True)) == [
        (0, 5, 1.0), (1, 6, 0.0), (2, 7, 1.0), (39, 59, 1.0)
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(columns | {"item_id": [5, 6, 60, 7]}), path)
    with pytest.raises(TaskError, match="row 3: id 60 is outside"):
        list(task.train_batches(0))
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(TaskError, match="cannot be read as Parquet"):
        list(task.train_batches(0))


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("user,item,label\n1,2,1\n40,3,0\n", {}, "line 3: id 40 is outside 'user_emb.weight', whose ids are 0 to 39"),
        ("1,2,1\n1,-1,0\n", {}, "line 2: id -1 is outside 'item_emb.weight'"),
        ("1,2,1\n0,3,0\n", {"first_id": 1}, "line 2: id 0 is outside 'user_emb.weight', whose ids are 1 to 40"),
        ("1,2,1\n1,x,0\n", {}, "line 2: 'x' is not a number"),
        ("1,2,1\n1,,0\n", {}, "line 2: '' is not a number"),
        ("1,2,1\n1,2\n", {}, "line 2: 2 cells, but the first line has 3"),
        ("1,2,4\n", {}, "line 1: the label is 4. Labels have to be 0 and 1 (or -1 and 1); for ratings set threshold"),
        ("1,2,1\n1,2,\n", {}, "line 2: the label is missing"),
        ("1,2,1\n1,2,up\n", {}, "line 2: 'up' is not a number"),
        ("", {}, "is empty"),
        ("a,b,c\n1,2,1\n", {"user": "u", "item": "b", "label": "c"}, "has no column 'u': it has a, b, c"),
        ("1,2\n", {}, "has 2 columns, but no column 2"),
        ('1,2,1\n1,"2,1\n', {}, "line"),
        ("1,2,1\n18446744073709551615,2,1\n", {}, "line 2: '18446744073709551615' exceeds 64 bits"),
        ('1,2,1\n\n3,"4\n",1\nx,4,1\n', {}, "line 5: 'x' is not a number"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_mean_is_refused_with_its_line(
    tmp_path: Path, text: str, settings: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "bad.csv", text)
    with pytest.raises(TaskError) as caught:
        task = builtin_task("gmf", pair_file(tmp_path), options(path, held_out=[path], **settings))
        list(task.train_batches(0))
    assert message in str(caught.value) and "bad.csv" in str(caught.value)


def test_a_file_that_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_bytes(b"1,2,1\n\xff\xfe,2,1\n")
    with pytest.raises(TaskError, match="not a UTF-8 text file"):
        list(read_blocks(tmp_path / "b.csv", [0]))
    for read in (lambda p: list(read_blocks(p, [0])), heading, lambda p: list(read_libfm(p))):
        with pytest.raises(TaskError, match="no such data file"):
            read(tmp_path / "none.csv")


def test_blocks_do_not_change_what_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", clicks_text(count=100))
    whole = next(read_blocks(path, ["item", 0]))
    parts = list(read_blocks(path, ["item", 0], block_rows=7))
    assert [block.lines[0] for block in parts[:3]] == [2, 9, 16]
    for column in (0, 1):
        assert whole.columns[column].tolist() == [x for block in parts for x in block.columns[column].tolist()]


def test_thresholds_skips_and_columns_make_labels_of_ratings(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", "when,who,what,stars\n9,1,1,5\n9,2,2,3\n9,3,3,1\n9,4,4,4\n")
    given = {"user": "who", "item": "what", "label": "stars", "threshold": 4, "skip": 3, "first_id": 1}
    task = builtin_task("gmf", pair_file(tmp_path), options(path, held_out=[path], **given))
    (user, item, label), *_ = task.train_batches(0)
    rows = sorted(zip(user.tolist(), item.tolist(), label.tolist(), strict=True))
    assert rows == [(0, 0, 1.0), (2, 2, 0.0), (3, 3, 1.0)]


def test_examples_are_trained_on_or_held_out_each_once_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "_SHUFFLED_ROWS", 100)  # many pieces
    paths = [tmp_path / "a", tmp_path / "b"]
    starts = {paths[0]: 0, paths[1]: 1000}

    def read(path: Path) -> Any:
        for block in torch.arange(starts[path], starts[path] + 337).split(50):
            yield (block,)

    files = ExampleFiles(DataOptions(tuple(paths), (), 32), read, hold_out=0.1)
    epochs = [torch.cat([batch[0] for batch in files.train_batches(epoch)]) for epoch in (0, 1)]
    held_out = torch.cat([batch[0] for batch in files.held_out_batches()])
    assert len(held_out) == 67 and len(epochs[0]) == 674 - 67
    everything = torch.cat([torch.arange(337), torch.arange(1000, 1337)])
    for epoch in epochs:
        assert torch.equal(torch.cat([epoch, held_out]).sort().values, everything)
    assert not torch.equal(*epochs)  # shuffled anew
    sizes = [len(batch[0]) for batch in files.train_batches(0)]
    assert set(sizes[:-1]) == {32} and sizes[-1] == 607 % 32


# metrics


def test_auc_is_the_chance_of_a_right_order() -> None:
    generator = torch.Generator().manual_seed(5)
    scores, labels = (
        torch.randint(9, (60,), generator=generator).float(),
        torch.rand(60, generator=generator) > 0.6,
    )
    pairs = [
        1.0 if up > down else 0.5 if up == down else 0.0
        for up, down in itertools.product(scores[labels].tolist(), scores[~labels].tolist())
    ]
    assert auc(scores, labels.float()) == pytest.approx(sum(pairs) / len(pairs))
    assert math.isnan(auc(scores, torch.ones(60)))
    assert click_metrics(torch.zeros(4), torch.tensor([0.0, 1, 1, 0]))["bce"] == pytest.approx(math.log(2))


def test_ranks_become_hits_and_gains() -> None:
    found = ranking_metrics(torch.tensor([0, 2, 9, 10, 500]))
    assert found["hr@10"] == pytest.approx(3 / 5)
    assert found["ndcg@10"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(11)) / 5)


def test_ties_count_half_and_items_seen_do_not_count() -> None:
    scores = torch.tensor([[0.5, 1.0, 1.0, 2.0, 1.0], [3.0, 0.0, 1.0, 2.0, 4.0]])
    seen = torch.tensor([[False, False, False, True, False], [False, False, False, False, True]])
    ranks = target_ranks(scores, torch.tensor([1, 4]), seen)
    assert ranks.tolist() == [1.0, 0.0]  # two of the same score; a target that was seen takes part
    constant = target_ranks(torch.zeros(3, 41), torch.tensor([0, 7, 40]), torch.zeros(3, 41, dtype=torch.bool))
    assert constant.tolist() == [20.0] * 3 and ranking_metrics(constant)["ndcg@10"] == 0


def test_metrics_of_nan_scores_are_nan() -> None:
    scores = torch.tensor([[0.5, math.nan, 1.0]])
    ranks = target_ranks(scores, torch.tensor([0]), torch.zeros(1, 3, dtype=torch.bool))
    assert all(math.isnan(value) for value in ranking_metrics(torch.cat([ranks, torch.zeros(9)])).values())
    labels = torch.tensor([1.0, 1, 0, 0])
    assert all(math.isnan(value) for value in click_metrics(torch.full((4,), math.nan), labels).values())


# pairs


def test_gmf_is_the_product_of_rows(tmp_path: Path) -> None:
    out = {"head.weight": torch.randn(1, D), "head.bias": torch.randn(1)}
    path = write(tmp_path / "c.csv", clicks_text())
    for more in ({}, out):
        small = pair_file(tmp_path, **more)
        model = builtin_task("gmf", small, options(path)).model()
        state = torch.load(tmp_path / "ckpt.pt")
        model.load_state_dict(state)
        user, item = torch.tensor([3, 39]), torch.tensor([59, 0])
        product = state["user_emb.weight"][user] * state["item_emb.weight"][item]
        expected = F.linear(product, *more.values())[:, 0] if more else product.sum(1)
        assert torch.allclose(model(user, item), expected, atol=1e-6)
        assert set(tuned(builtin_task("gmf", small, options(path)), small)) == {"auc", "bce"}


def test_two_towers_are_perceptrons_over_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    towers = {
        "user_tower.0.weight": torch.randn(12, D), "user_tower.0.bias": torch.randn(12),
        "user_tower.2.weight": torch.randn(5, 12), "item_tower.0.weight": torch.randn(5, D),
    }  # fmt: skip
    small = pair_file(tmp_path, **towers)
    path = write(tmp_path / "c.csv", clicks_text())
    task = builtin_task("two-tower", small, options(path, normalize="yes", scale=7, metric="bce"))
    assert (task.metric, task.mode) == ("bce", "min")
    model, state = task.model(), torch.load(tmp_path / "ckpt.pt")
    model.load_state_dict(state)
    user, item = torch.tensor([3, 39]), torch.tensor([59, 0])
    hidden = F.relu(
        F.linear(state["user_emb.weight"][user], state["user_tower.0.weight"], state["user_tower.0.bias"])
    )
    left = F.normalize(hidden @ state["user_tower.2.weight"].T)
    right = F.normalize(state["item_emb.weight"][item] @ state["item_tower.0.weight"].T)
    assert torch.allclose(model(user, item), 7 * (left * right).sum(1), atol=1e-5)
    tuned(task, small)


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("gmf", {"speed": 1}, "task gmf has no setting speed: it has user, item, label"),
        ("gmf", {"threshold": "high"}, "setting threshold of task gmf is 'high': give float"),
        ("two-tower", {"normalize": "perhaps"}, "setting normalize of task two-tower is 'perhaps': give bool"),
        ("gmf", {"metric": "f1"}, "give auc or bce"),
        ("gmf", {"hold_out": 0.9}, "a share of at most 0.5"),
        ("gmf", {"user_table": "users"}, "the file has no table 'users': it has"),
        ("dlrm", {}, "task dlrm requires emb_l.0.weight and top_l.0.weight, but the file has"),
        ("sasrec", {}, "task sasrec requires 'pos_emb.weight', but the file has"),
    ],
)  # fmt: skip
def test_settings_and_files_that_do_not_fit_a_task_are_refused(
    tmp_path: Path, task: str, settings: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "c.csv", clicks_text())
    with pytest.raises(TaskError) as caught:
        builtin_task(task, pair_file(tmp_path), options(path, **settings)).model()
    assert message in str(caught.value)


def test_a_file_with_more_than_the_model_has_is_refused(tmp_path: Path) -> None:
    small = pair_file(tmp_path, **{"attention.weight": torch.randn(3, 3)})
    with pytest.raises(TaskError, match="does not support attention.weight of the file"):
        builtin_task("gmf", small, options(write(tmp_path / "c.csv", clicks_text()))).model()


# dlrm


SIZES, DIM, NUM_DENSE = (50, 30, 7), 4, 13


class FacebookDLRM(nn.Module):
    """The forward of github.com/facebookresearch/dlrm, up to its last sigmoid, written after its paper."""

    def __init__(self, sizes: tuple[int, ...], itself: bool) -> None:
        super().__init__()
        self.itself = itself
        self.emb_l = nn.ModuleList([nn.EmbeddingBag(n, DIM, mode="sum") for n in sizes])
        self.bot_l = nn.Sequential(nn.Linear(NUM_DENSE, 6), nn.ReLU(), nn.Linear(6, DIM), nn.ReLU())
        n = len(sizes) + 1
        width = DIM + n * (n - 1) // 2 + n * itself
        self.top_l = nn.Sequential(nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, 1), nn.Sigmoid())

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        x = self.bot_l(dense)
        vectors = [x, *(table(ids[:, i : i + 1]) for i, table in enumerate(self.emb_l))]
        products = [
            (vectors[i] * vectors[j]).sum(1)
            for i in range(len(vectors))
            for j in range(i + self.itself)
        ]  # fmt: skip
        return self.top_l[:-1](torch.cat([x, torch.stack(products, 1)], 1))[:, 0]


def criteo_text(count: int = 300) -> str:
    lines = []
    for i in range(count):
        numbers = ["" if (i + j) % 5 == 0 else str(j - 2) for j in range(NUM_DENSE)]
        categories = ["" if (i + j) % 7 == 0 else f"{(i * 2654435761 + j) % 2**32:08x}" for j in range(len(SIZES))]
        lines.append("\t".join([str(i % 2), *numbers, *categories]))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("itself", [False, True])
def test_dlrm_reads_criteo_and_computes_what_its_code_computes(tmp_path: Path, itself: bool) -> None:
    torch.manual_seed(0)
    reference = FacebookDLRM(SIZES, itself)
    tables = [f"emb_l.{i}.weight" for i in range(2)]
    small = small_file(tmp_path, reference.state_dict(), tables)
    path = write(tmp_path / "day_0", criteo_text())
    task = builtin_task("dlrm", small, options(path, held_out=[path], batch_size=300))
    assert (task.metric, task.mode) == ("bce", "min")
    model = task.model()
    model.load_state_dict(reference.state_dict())
    ((dense, ids, label),) = task.train_batches(0)
    assert torch.allclose(model(dense, ids), reference(dense, ids), atol=1e-5)
    rows = {
        tuple(round(x, 4) for x in d) + tuple(i) + (y,)
        for d, i, y in zip(dense.tolist(), ids.tolist(), label.tolist(), strict=True)
    }
    i = 16
    numbers = [0.0 if (i + j) % 5 == 0 else round(math.log1p(max(0, j - 2)), 4) for j in range(NUM_DENSE)]
    categories = [0 if (i + j) % 7 == 0 else (i * 2654435761 + j) % 2**32 % SIZES[j] for j in range(3)]
    assert (*numbers, *categories, float(i % 2)) in rows
    metrics = tuned(task, small)
    assert metrics["bce"] > 0


def test_dlrm_on_row_numbers_refuses_those_outside(tmp_path: Path) -> None:
    small = small_file(tmp_path, FacebookDLRM(SIZES, False).state_dict(), ["emb_l.0.weight"])
    good = "\t".join(["1", *["3"] * 13, "49", "29", "6"])
    path = write(tmp_path / "day", f"{good}\n")
    task = builtin_task("dlrm", small, options(path, held_out=[path], ids="int"))
    assert next(iter(task.train_batches(0)))[1].tolist() == [[49, 29, 6]]
    write(path, f"{good}\n{good[:-1]}7\n")
    with pytest.raises(TaskError, match=r"line 2: id 7 is outside 'emb_l.2.weight'"):
        list(task.train_batches(0))
    write(path, f"{good}\n{good[:-1]}hat\n")
    with pytest.raises(TaskError, match=r"line 2: .*hat.* is not a hexadecimal number"):
        list(builtin_task("dlrm", small, options(path, held_out=[path])).train_batches(0))


def test_dlrm_on_libfm_reads_one_table_for_all_fields(tmp_path: Path) -> None:
    torch.manual_seed(0)
    n = 3
    state = {
        "emb_l.0.weight": torch.randn(200, DIM), "top_l.0.weight": torch.randn(5, n * DIM + n * (n - 1) // 2),
        "top_l.0.bias": torch.randn(5), "top_l.2.weight": torch.randn(1, 5), "top_l.2.bias": torch.randn(1),
    }  # fmt: skip
    small = small_file(tmp_path, state, ["emb_l.0.weight"])
    path = write(
        tmp_path / "a.libfm", "".join(f"{1 - 2 * (i % 2)} {i}:1 {i + 50}:1 {i + 100}:1\n" for i in range(90))
    )
    task = builtin_task("dlrm", small, options(path, held_out=[path], batch_size=90))
    model = task.model()
    model.load_state_dict(state)
    ((dense, ids, label),) = task.train_batches(0)
    assert ids.shape == (90, n) and set(label.tolist()) == {0.0, 1.0}
    rows = state["emb_l.0.weight"][ids]
    products = torch.stack([(rows[:, i] * rows[:, j]).sum(1) for i, j in ((1, 0), (2, 0), (2, 1))], 1)
    hidden = F.relu(
        F.linear(torch.cat([rows.flatten(1), products], 1), state["top_l.0.weight"], state["top_l.0.bias"])
    )
    expected = F.linear(hidden, state["top_l.2.weight"], state["top_l.2.bias"])[:, 0]
    assert torch.allclose(model(dense, ids), expected, atol=1e-4)
    tuned(task, small)
    for text, message in (
        ("1 2:1 3:1 4:1\n1 2:1 3:1\n", "line 2: '1 2:1 3:1' is not a label and 3 ids"),
        ("1 2:1 3:0.5 4:1\n", "line 1: '1 2:1 3:0.5 4:1' is not"),
        ("1 2:1 3:1 4:x\n", "line 1: '1 2:1 3:1 4:x' is not"),
        ("1 2:1 3:1 200:1\n", "line 1: id 200 is outside 'emb_l.0.weight'"),
    ):
        with pytest.raises(TaskError) as caught:
            list(builtin_task("dlrm", small, options(write(path, text), held_out=[path])).train_batches(0))
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("latin.csv", "user,item,label,title\n1,2,1,Caf\xe9\n".encode("latin-1"), "is not a UTF-8 text file"),
        ("latin.tsv", "us\xe9r\titem\tlabel\n".encode("latin-1"), "is not a UTF-8 text file"),
        ("plain.csv.gz", b"user,item,label\n1,2,1\n", "cannot be read: Not a gzipped file"),
        ("torn.csv.gz", gzip.compress(clicks_text().encode())[:-9], "cannot be read: Compressed file ended"),
        ("none.csv", None, "no such data file"),
        ("none.parquet", None, "pyarrow|no such file|No such file"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    task = builtin_task("gmf", pair_file(tmp_path), options(tmp_path / name, held_out=[tmp_path / name]))
    with pytest.raises(TaskError, match=message):
        list(task.train_batches(0))


def test_marks_empty_lines_and_quotes_in_titles_do_not_lose_rows(tmp_path: Path) -> None:
    small = pair_file(tmp_path)
    quoted = 'user\titem\tlabel\ttitle\n1\t2\t1\t"Salem\n\n2\t3\t0\t3"\n3\t4\t1\t\n\n'
    marked = "\ufeff1,2,1\n2,3,0\n3,4,1\n"
    for name, text in (("a.tsv", quoted), ("a.csv", marked), ("a.csv.gz", marked), ("b.csv", marked + "\n")):
        path = write(tmp_path / name, text)
        ((user, item, label),) = builtin_task("gmf", small, options(path, held_out=[path])).train_batches(0)
        found = sorted(zip(user.tolist(), item.tolist(), label.tolist(), strict=True))
        assert found == [(1, 2, 1.0), (2, 3, 0.0), (3, 4, 1.0)], name


def test_layers_of_towers_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    linears = {f"user_fc{i}.weight": torch.randn(D, D) for i in (2, 10, 0)}
    path = write(tmp_path / "c.csv", clicks_text())
    model = builtin_task("two-tower", pair_file(tmp_path, **linears), options(path)).model()
    model.load_state_dict(torch.load(tmp_path / "ckpt.pt"))
    state = torch.load(tmp_path / "ckpt.pt")
    x = state["user_emb.weight"][:3]
    for i, last in ((0, False), (2, False), (10, True)):
        x = F.linear(x, state[f"user_fc{i}.weight"])
        x = x if last else F.relu(x)
    expected = (x * state["item_emb.weight"][:3]).sum(1)
    assert torch.allclose(model(torch.arange(3), torch.arange(3)), expected, atol=1e-4)
    for wrong, message in (
        ({"user_in.weight": torch.randn(D, D), "user_hidden.weight": torch.randn(D, D)}, "cannot order"),
        (
            {"user_fc0.weight": torch.randn(4, D), "user_fc1.weight": torch.randn(D, D)},
            "has 8 inputs, but the layer before",
        ),
    ):
        with pytest.raises(TaskError, match=message):
            builtin_task("two-tower", pair_file(tmp_path, **wrong), options(path)).model()


def test_libfm_lines_have_an_id_for_each_table(tmp_path: Path) -> None:
    state = {f"emb_l.{i}.weight": torch.randn(50, D) for i in range(2)}
    state |= {"top_l.0.weight": torch.randn(1, 2 * D + 1), "top_l.0.bias": torch.randn(1)}
    small = small_file(tmp_path, state, ["emb_l.0.weight", "emb_l.1.weight"])
    path = write(tmp_path / "c.libfm", "1 2:1 3:1 4:1\n")
    with pytest.raises(TaskError, match="has 3 ids per line and no dense features, but the model has 2 tables"):
        builtin_task("dlrm", small, options(path))


# sasrec


def sasrec_state(num_items: int, length: int, blocks: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = {
        "item_emb.weight": torch.randn(num_items, D) * 0.3,
        "pos_emb.weight": torch.randn(length + 1, D) * 0.1,
    }
    norm, attention, conv = nn.LayerNorm(D), nn.MultiheadAttention(D, 1), nn.Conv1d(D, D, 1)
    for i in range(blocks):
        for name, module in (
            ("attention_layernorms", norm), ("attention_layers", attention), ("forward_layernorms", norm)
        ):  # fmt: skip
            state |= {f"{name}.{i}.{key}": torch.randn_like(t) * 0.3 for key, t in module.state_dict().items()}
        for layer in ("conv1", "conv2"):
            state |= {
                f"forward_layers.{i}.{layer}.{key}": torch.randn_like(t) * 0.3
                for key, t in conv.state_dict().items()
            }
    return state | {f"last_layernorm.{key}": torch.randn_like(t) for key, t in norm.state_dict().items()}


SEQUENCES = "7 1 2 3 4 5 6\n8 5 4 3\n9 2 9\n10 11 12 13 14 15 16 17 18 19\n"


def sasrec_task(folder: Path, text: str = SEQUENCES, **settings: Any) -> tuple[Task, Path]:
    small = small_file(folder, sasrec_state(20, 5), ["item_emb.weight"])
    return builtin_task("sasrec", small, options(write(folder / "seq.txt", text), **settings)), small


def test_sasrec_trains_on_all_but_the_last_two_items_of_users(tmp_path: Path) -> None:
    task, small = sasrec_task(tmp_path)
    ((items, wanted),) = task.train_batches(0)
    found = sorted(zip(items.tolist(), wanted.tolist(), strict=True))
    assert found == [([0, 0, 1, 2, 3], [0, 0, 2, 3, 4]), ([12, 13, 14, 15, 16], [13, 14, 15, 16, 17])]
    model = task.model()
    model.load_state_dict(torch.load(tmp_path / "ckpt.pt"))
    losses = task.loss(model, (items, wanted))
    assert losses.shape == (8,) and bool((losses > 0).all())
    assert set(tuned(task, small)) == {"ndcg@10", "hr@10", "test_ndcg@10", "test_hr@10"}


def test_sasrec_ranks_among_all_items_or_drawn_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, small = sasrec_task(tmp_path)
    (batch,) = task.train_batches(0)
    model: Any = task.model().eval()
    model.load_state_dict(torch.load(tmp_path / "ckpt.pt"))
    assert task.logits is not None
    real = batch[1] > 0
    scores = (model(batch[0]) @ model.item_emb.weight.T)[real]
    scores[:, 0] = -torch.inf
    wanted = -scores.log_softmax(1)[torch.arange(8), batch[1][real]]
    assert torch.allclose(task.loss(model, batch), wanted, atol=1e-5)
    assert torch.allclose(task.logits(model, batch), scores[:, 1:], atol=1e-5)
    bce = builtin_task("sasrec", small, options(tmp_path / "seq.txt", loss="bce")).loss(model, batch)
    assert bce.shape == (8,) and not torch.allclose(bce, wanted, atol=1e-2)

    monkeypatch.setattr(sequences, "_CANDIDATES", 4)  # fewer than there are items
    monkeypatch.setattr(sequences, "_LOGITS", 20)  # room for five of the eight positions
    torch.manual_seed(0)
    before = torch.get_rng_state()
    losses = task.loss(model, batch)
    torch.set_rng_state(before)
    logits = task.logits(model, batch)
    assert losses.shape == (5,) and 5 <= logits.shape[1] <= 9
    of_each = logits.logsumexp(1, keepdim=True) - logits  # the loss, were this candidate the wanted one
    assert bool((losses[:, None] - of_each).abs().amin(1).lt(1e-5).all())
    tuned(task, small)


def test_sasrec_reads_pairs_and_gzipped_files(tmp_path: Path) -> None:
    task, small = sasrec_task(tmp_path)
    lines = (line.split() for line in SEQUENCES.splitlines())
    pairs = "".join(f"{user} {item}\n" for user, *items in lines for item in items)
    other = builtin_task("sasrec", small, options(write(tmp_path / "pairs.txt.gz", pairs)))
    for one, two in zip(task.train_batches(0), other.train_batches(0), strict=True):
        assert sorted(one[0].tolist()) == sorted(two[0].tolist())
    mixed = builtin_task("sasrec", small, options(write(tmp_path / "mixed.txt", "1 5\n2 6\n1 7\n2 8\n")))
    with pytest.raises(TaskError, match="consecutive lines for each user"):
        mixed.measure(mixed.model())


def test_sasrec_does_not_look_ahead_nor_at_padding(tmp_path: Path) -> None:
    for norm_first in ("yes", "no"):
        model = sasrec_task(tmp_path, norm_first=norm_first)[0].model().eval()
        model.load_state_dict(torch.load(tmp_path / "ckpt.pt"))
        short, long = torch.tensor([[0, 0, 1, 2, 3]]), torch.tensor([[0, 0, 1, 2, 9]])
        assert torch.allclose(model(short)[:, :4], model(long)[:, :4], atol=1e-6)
        assert not torch.allclose(model(short)[:, 4], model(long)[:, 4], atol=1e-3)


def test_sasrec_ranks_the_wanted_item_among_those_not_had(tmp_path: Path) -> None:
    task, _ = sasrec_task(tmp_path)
    model: Any = task.model().eval()
    model.load_state_dict(torch.load(tmp_path / "ckpt.pt"))
    gains, hits = [], []
    for line in SEQUENCES.splitlines():
        items = [int(x) for x in line.split()[1:]]
        if len(items) < 3:
            continue
        history = items[:-1]
        row = torch.tensor([([0] * 5 + history)[-5:]])
        scores = (model.item_emb.weight @ model(row)[0, -1]).tolist()
        others = [scores[i] for i in range(1, 20) if i not in history]
        rank = sum(score > scores[items[-1]] for score in others)
        gains.append(1 / math.log2(rank + 2) if rank < 10 else 0.0)
        hits.append(float(rank < 10))
    with torch.no_grad():
        found = task.measure(model)
    assert found["test_ndcg@10"] == pytest.approx(sum(gains) / len(gains), abs=1e-6)
    assert found["test_hr@10"] == pytest.approx(sum(hits) / len(hits), abs=1e-6)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("1 2 3 4\n2 3 x 5\n", {}, "line 2: '2 3 x 5' is not `user item ...`"),
        ("1 2 3 4\n2 3 20 5\n", {}, "line 2: item 20 is outside 'item_emb.weight', whose ids are 1 to 19"),
        ("1 2 0 4\n", {}, "line 1: item 0 is outside"),
        (SEQUENCES, {"loss": "hinge"}, "give bce or ce"),
        (SEQUENCES, {"metric": "auc"}, "give ndcg@10 or hr@10"),
        (SEQUENCES, {"num_heads": 3}, "num_heads is 3: give a divisor of 8 dimensions"),
        (SEQUENCES, {"held_out": [Path("x")]}, "omit --eval-file"),
    ],
)  # fmt: skip
def test_sequences_and_settings_that_do_not_fit_are_refused(
    tmp_path: Path, text: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TaskError) as caught:
        list(sasrec_task(tmp_path, text, **settings)[0].train_batches(0))
    assert message in str(caught.value)


def test_every_built_in_task_is_shown_where_one_is_missing(cli: Callable[..., Any], tmp_path: Path) -> None:
    small = pair_file(tmp_path)
    assert all(name in cli("finetune", small, code=2).stderr for name in BUILTIN)
    assert "no built-in task and no file 'gmff'" in cli("finetune", small, "--task", "gmff", code=1).stderr
    assert "--task gmf requires --train-file" in cli("finetune", small, "--task", "gmf", code=2).stderr
