"""`rayloom data preview`: what the model will be shown, before anything is trained."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from rayloom.config.job import JobConfig
from rayloom.data.plan import Plan
from rayloom.data.rows import Encoded, row_name
from rayloom.data.sample import Measured, Sample, histogram, measure_lengths, take_sample
from rayloom.models.tokenizer import TokenizerSource, load_tokenizer
from rayloom.stages.prepare import prepare_data, segment_options

_WIDTH, _BAR, _NAME = 110, 48, 24
_TRAINED, _READ, _TRAINED_SPECIAL, _READ_SPECIAL = "green", "dim", "bold green", "cyan"
_OPEN, _CLOSE = "⟦", "⟧"


def preview(job: JobConfig, rows: int, console: Console) -> None:
    """Show the first `rows` examples of the stream as the model will see them, then what the data is like.

    Raises:
        RequestError: the model, the data or the template cannot be used.
    """
    with console.status("reading the data"):
        plan, encoder = prepare_data(job)
        sample = take_sample(plan, encoder, segment_options(job), first=rows)
    if sample.first:
        _show_examples(sample.first, plan, load_tokenizer(TokenizerSource.of(job.model)), job.data.cutoff, console)
    about = "" if plan.is_exact else "about "
    measured = f"the first {len(sample.examples):,} of {about}{plan.estimated_epoch_length:,} examples of an epoch"
    if sample.is_whole:
        measured = f"all {len(sample.examples):,} examples of an epoch"
    console.print(Text.assemble(("Mix", "bold"), f"  {job.data.mix}"))
    console.print(_mix_table(plan))
    console.print(Text.assemble("\n", ("Tokens", "bold"), f"  {measured}, cutoff {job.data.cutoff:,}"))
    console.print(_token_table(plan, sample))
    console.print(Text.assemble("\n", ("Lengths", "bold"), "  examples by tokens"))
    for bar in _bars(sample, job.data.cutoff, min(console.width, _WIDTH)):
        console.print(bar, soft_wrap=True)
    console.print(Text.assemble("\n", ("Rows", "bold")))
    for line in _findings(job, plan, sample):
        console.print(Text(line), soft_wrap=not console.is_terminal)


# --- examples -------------------------------------------------------------------------------------------------------


def _show_examples(examples: Iterable[Encoded], plan: Plan, tokenizer: Any, cutoff: int, console: Console) -> None:
    in_colour = console.color_system is not None and not console.no_color
    if in_colour:
        legend = Text.assemble(("trained", _TRAINED), "  ", ("read only", _READ), "  ", ("special", _READ_SPECIAL))
        console.print(legend.append("  ↵ line break", _READ))
    else:
        console.print(f"{_OPEN}trained{_CLOSE} read only", markup=False)
    for example in examples:
        trained = sum(label >= 0 for label in example.labels[1:])
        title = Text.assemble((plan.sets[example.set].name, "bold"), f", row {row_name(example.row)}: ")
        title.append(f"{_count(len(example.input_ids), 'token')}, {trained} trained")
        if not trained or len(example.input_ids) > cutoff:
            title.append(", left out", "bold red")
        console.print(Rule(title, align="left", style="dim"), width=min(console.width, _WIDTH))
        spans = list(spans_of(example, tokenizer, cutoff))
        text = _coloured(spans) if in_colour else Text(_marked(spans))
        if len(example.input_ids) > cutoff:
            text.append(f"\n... {len(example.input_ids) - cutoff} more tokens", "red")
        console.print(text, soft_wrap=not console.is_terminal, end="" if text.plain.endswith("\n") else "\n")
        console.print()


def spans_of(example: Encoded, tokenizer: Any, limit: int) -> Iterator[tuple[str, bool, bool]]:
    """(text, is trained, is special) of each stretch of like tokens within the first `limit`, in order.

    Each prefix is decoded from the beginning: a tokenizer may write a token otherwise where a text begins, and a
    character may be spread over two tokens. Such a character goes with the later token.
    """
    ids = example.input_ids[:limit]
    special = _special_tokens(tokenizer)
    kinds = [(label >= 0, token in special) for token, label in zip(ids, example.labels, strict=False)]
    shown = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or kinds[end] != kinds[end - 1]:
            text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if end < len(ids):
                text = text.rstrip("\N{REPLACEMENT CHARACTER}")
            yield visible(text[shown:]), *kinds[end - 1]
            shown = len(text)


def visible(text: str) -> str:
    """The text with control characters made visible, but for line breaks and tabs: data must not steer a terminal."""
    return "".join(char if char in "\n\t" or not _steers(char) else f"<U+{ord(char):04X}>" for char in text)


def _steers(char: str) -> bool:
    is_bidi = unicodedata.bidirectional(char) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return is_bidi or unicodedata.category(char) == "Cc"


def _special_tokens(tokenizer: Any) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(token for token, entry in added if entry.special)}


def _coloured(spans: Iterable[tuple[str, bool, bool]]) -> Text:
    text = Text(no_wrap=False)
    for piece, is_trained, is_special in spans:
        plain = _TRAINED if is_trained else _READ
        style = (_TRAINED_SPECIAL if is_trained else _READ_SPECIAL) if is_special else plain
        for number, line in enumerate(piece.split("\n")):
            if number:
                text.append("↵\n", plain)
            text.append(line, style)
    return text


def _marked(spans: Iterable[tuple[str, bool, bool]]) -> str:
    text, was_trained = "", False
    for piece, is_trained, _ in spans:
        if is_trained != was_trained:
            text += _OPEN if is_trained else _CLOSE
        text, was_trained = text + piece, is_trained
    return text + _CLOSE if was_trained else text


# --- numbers --------------------------------------------------------------------------------------------------------


def _table(columns: Iterable[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1), pad_edge=False, header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True, vertical="bottom")
    return table


def _mix_table(plan: Plan) -> Table:
    mixture, length = plan.estimated_mixture(), plan.estimated_epoch_length
    table = _table(("data set", "format", "rows", "in an epoch", "share", "passes"))
    for data_set, count in zip(plan.sets, mixture.counts(length), strict=True):
        about = "about " if data_set.length is None else ""
        passes = f"{count / data_set.estimated_rows:.2f}"
        numbers = (f"{about}{data_set.estimated_rows:,}", f"{about}{count:,}", _percent(count, length), passes)
        table.add_row(_short(data_set.name), data_set.description.format, *numbers)
    if len(plan.sets) > 1:
        table.add_section()
        rows = sum(data_set.estimated_rows for data_set in plan.sets)
        about = "" if plan.is_exact else "about "
        table.add_row("all", "", f"{about}{rows:,}", f"{about}{length:,}", _percent(length, length), "")
    return table


def _token_table(plan: Plan, sample: Sample) -> Table:
    head = ("data set", "examples", "min", "median", "p95", "max", "trained", "cut", "left\nout")
    table = _table(head)
    for number, data_set in enumerate(plan.sets):
        table.add_row(*_token_row(data_set.name, [example for example in sample.examples if example.set == number]))
    if len(plan.sets) > 1:
        table.add_section()
        table.add_row(*_token_row("all", sample.examples))
    return table


def _token_row(name: str, examples: Iterable[Measured]) -> list[str | Text]:
    examples = list(examples)
    if not examples:
        return [_short(name), "0", *"-------"]
    lengths = measure_lengths([example.tokens + example.cut for example in examples])
    kept = [example for example in examples if example.dropped is None]
    counts = (sum(example.cut > 0 for example in kept), len(examples) - len(kept))
    return [
        _short(name),
        f"{len(examples):,}",
        *(f"{value:,}" for value in (lengths.smallest, lengths.median, lengths.p95, lengths.largest)),
        _percent(sum(example.trained for example in kept), sum(example.tokens for example in kept)),
        *(Text(f"{count:,}", "bold red" if count else "") for count in counts),
    ]


def _findings(job: JobConfig, plan: Plan, sample: Sample) -> Iterator[str]:
    kept = len(sample.kept)
    if not kept:
        yield "nothing of it can be trained on: the job would be refused"
        return
    cutoff, tokens = job.data.cutoff, sample.kept_tokens
    packed = f"{_count(sample.packed_rows, 'row')} of {cutoff:,} tokens"
    packed += f", {_percent(tokens, sample.packed_rows * cutoff)} full"
    if job.stage.rows == "pairs":
        yield f"a row is a pair of answers to one prompt, {tokens / kept:,.0f} tokens on average"
    elif job.stage.rows == "judgements":
        yield f"a row is one answer that was judged, {tokens / kept:,.0f} tokens on average"
    elif job.stage.rows == "prompts":
        yield f"a row is one prompt, {tokens / kept:,.0f} tokens on average; answers have at most " + (
            f"{job.rollout.max_tokens:,} tokens"
        )
    elif job.packs:
        yield f"packing makes {packed}, of {_count(kept, 'example')}"
    else:
        yield f"packing is off: a row is one example, {tokens / kept:,.0f} tokens on average"
        yield f"with packing, {_count(kept, 'example')} would make {packed}"
    rows = sample.packed_rows if job.packs else kept
    in_epoch = rows * plan.estimated_epoch_length / len(sample.examples)
    train = job.train
    per_step = train.rows_per_step
    yield (
        f"an epoch is about {_about(in_epoch)} rows; at {per_step} a step, about {_about(in_epoch / per_step)} steps "
        f"({_count(train.workers, 'worker')}, batch_size {train.batch_size}, "
        f"gradient_accumulation {train.accumulation})"
    )


def _bars(sample: Sample, cutoff: int, width: int) -> Iterator[Text]:
    bins = histogram([example.tokens + example.cut for example in sample.examples], cutoff)
    labels = [f"{b.start:,}-{b.stop:,}" if b.stop else f"{b.start:,} and more" for b in bins]
    label_width = max(map(len, labels))
    most = max(b.count for b in bins)
    room = min(_BAR, width - label_width - len(f"{most:,} longer than the cutoff") - 6)
    for label, item in zip(labels, bins, strict=True):
        too_long = item.start > cutoff
        bar = "█" * round(room * item.count / most) or ("▏" if item.count else "")
        text = Text(f"{label:>{label_width}}  ")
        text.append(bar, "red" if too_long else "blue").append(f" {item.count:,}" if bar else "0", "dim")
        yield text.append("  longer than the cutoff" if too_long else "", "red")


def _short(name: str) -> str:
    return name if len(name) <= _NAME else name[: _NAME - 1] + "…"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


def _about(number: float) -> str:
    """Three digits: what is extrapolated from a sample is not known to more."""
    digits = 10 ** max(0, len(str(round(number))) - 3)
    return f"{max(1, round(number / digits) * digits):,}"
