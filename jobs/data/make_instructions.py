"""Make the general instruction rows of the demo data, in the OpenAI messages format.

Every answer is computed or comes from a table, in the modules of instruction_rows/, so it is right by construction.
The same seed and number of rows always give the same bytes:

    python jobs/data/make_instructions.py --seed 0 --rows 1200 --output jobs/data/instructions.jsonl
"""

import argparse
import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from instruction_rows import facts, texts
from instruction_rows.words import Draft


class Topic(NamedTuple):
    """A maker of drafts, how often it is chosen, and a system message that all its answers obey."""

    make: Callable[[random.Random], Draft]
    weight: float
    system: str


TOPICS = (
    Topic(facts.capitals, 7, "You are a geography tutor. Answer in one sentence."),
    Topic(facts.arithmetic, 13, "You are a maths tutor. Show the calculation."),
    Topic(facts.units, 7, "You convert units and show the calculation."),
    Topic(texts.lists, 8, "You work with lists of words and numbers. Be brief."),
    Topic(texts.spelling, 5, "You are a spelling coach. Be brief."),
    Topic(texts.rewriting, 9, "You edit sentences. Reply with the new sentence only."),
    Topic(facts.concepts, 13, "Explain things in plain words, in two sentences."),
    Topic(facts.how_to, 6, "You give short, practical advice."),
    Topic(facts.comparisons, 7, "You compare things in a sentence or two."),
    Topic(facts.python_code, 9, "You are a Python tutor. Explain each answer briefly."),
    Topic(texts.emails, 8, "You draft short, polite emails."),
    Topic(facts.dates, 5, "You answer questions about dates and the calendar."),
    Topic(texts.word_forms, 6, "You are an English teacher."),
    Topic(texts.extraction, 6, "You extract facts from text. Reply with the facts only."),
    Topic(texts.to_json, 6, "You turn facts into JSON. Reply with JSON only."),
    Topic(texts.sentiment, 7, "You label sentences as positive, negative or neutral."),
)
LOOSE_TOPICS = (facts.capitals, facts.concepts, facts.how_to, facts.comparisons)
"""Topics whose questions people also type without capital letters and question marks."""

GENERAL_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a careful assistant. Give correct answers.",
    "Help the user with clear and polite answers.",
    "Answer clearly and keep to the point.",
)
THANKS = (
    ("Thanks!", "You are welcome!"),
    ("Thank you, that is all.", "You are welcome. Have a nice day!"),
    ("Great, thank you.", "You are welcome. Feel free to ask if anything else comes up."),
    ("Perfect, thanks for the help.", "I am glad that I could help!"),
)


def make_row(rng: random.Random) -> list[dict[str, str]]:
    """Make the messages of one row: about 15 % have a system message, and about 15 % two or three turns."""
    (topic,) = rng.choices(TOPICS, weights=[topic.weight for topic in TOPICS])
    draft = topic.make(rng)
    turns = rng.choice((2, 2, 3)) if rng.random() < 0.15 else 1
    system = rng.choice((topic.system, rng.choice(GENERAL_SYSTEMS))) if rng.random() < 0.15 else ""
    question, answer = draft[0]
    if topic.make in LOOSE_TOPICS and rng.random() < 0.1:
        question = question.lower().rstrip("?.")
    exchanges = [(question, answer), *draft[1:turns]]
    if len(exchanges) < turns and system != topic.system:
        exchanges.append(rng.choice(THANKS))
    messages = [{"role": "system", "content": system}] if system else []
    for asked, answered in exchanges:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages


def first_question(messages: list[dict[str, str]]) -> str:
    """Reduce the first question to its letters and digits, to tell repeated ones."""
    text = next(message["content"] for message in messages if message["role"] == "user")
    return text.lower().translate(str.maketrans("", "", string.punctuation + string.whitespace))


def make_rows(seed: int, rows: int) -> list[list[dict[str, str]]]:
    """Make so many rows, no two of which open with the same question."""
    rng, repeats = random.Random(seed), 0
    made: list[list[dict[str, str]]] = []
    seen: set[str] = set()
    while len(made) < rows:
        messages = make_row(rng)
        if first_question(messages) not in seen:
            seen.add(first_question(messages))
            made.append(messages)
            repeats = 0
        elif (repeats := repeats + 1) > 10_000:
            raise SystemExit(f"only {len(made)} different rows can be made, not {rows}")
    return made


def main() -> None:
    """Write the rows as JSON lines."""
    parser = argparse.ArgumentParser(description="Make the general instruction rows of the demo data.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("instructions.jsonl"))
    arguments = parser.parse_args()
    lines = [
        json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
        for messages in make_rows(arguments.seed, arguments.rows)
    ]
    arguments.output.write_text("".join(lines), encoding="utf-8", newline="\n")
    print(f"wrote {len(lines)} rows to {arguments.output}")


if __name__ == "__main__":
    main()
