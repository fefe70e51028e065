"""Topics about words and texts: each function makes one question with its answer, and follow-ups."""

import json
import random
import string
from collections.abc import Sequence
from typing import Any

from . import tables
from .words import Draft, ask, cap, clock, count, listing, numbered, quoted, with_article, work_out


def on_material(rng: random.Random, material: str, tasks: Sequence[tuple[str, str]]) -> Draft:
    """Ask for one task on a given text or list, then for others on the same one."""
    (task, answer), *others = rng.sample(tasks, 3)
    forms = "{Task}: {material}|Please {task}: {material}|Can you {task}? {material}|{material}\n\n{Task}."
    question = ask(rng, forms, task=task, Task=cap(task), material=material)
    others = [(task.replace("this ", "the ").replace("these ", "the "), answer) for task, answer in others]
    return [(question, answer), *((f"Now take the original again and {task}.", answer) for task, answer in others)]


def lists(rng: random.Random) -> Draft:
    """Sort, reverse, search or count a short list of words or numbers."""
    words, numbers = rng.sample(tables.WORDS, rng.randint(4, 7)), rng.sample(range(1, 100), rng.randint(4, 6))
    low, high, letter = min(numbers), max(numbers), rng.choice(words)[0]
    if rng.random() < 0.5:
        tasks = [
            (
                rng.choice(("put these words in alphabetical order", "sort these words from A to Z")),
                ", ".join(sorted(words)),
            ),
            ("sort these words from Z to A", ", ".join(sorted(words, reverse=True))),
            ("list these words in the opposite order", ", ".join(reversed(words))),
            ("count these words", f"There are {len(words)} words."),
            ("turn these words into a numbered list", numbered(words)),
            (f'pick out the words that start with "{letter}"', listing([word for word in words if word[0] == letter])),
            ("name the first and the last of these words", f'The first is "{words[0]}" and the last is "{words[-1]}".'),
        ]
        return on_material(rng, ", ".join(words), tasks)
    rising, falling = (", ".join(map(str, sorted(numbers, reverse=back))) for back in (False, True))
    even = [str(number) for number in sorted(numbers) if number % 2 == 0]
    tasks = [
        ("sort these numbers from smallest to largest", rising),
        ("sort these numbers in descending order", falling),
        ("find the largest of these numbers", f"The largest number is {high}."),
        ("find the smallest of these numbers", f"The smallest number is {low}."),
        ("add up these numbers", work_out(f"{' + '.join(map(str, numbers))} = #")),
        ("list the even numbers among these", ", ".join(even) or "None of the numbers is even."),
        ("find the range of these numbers", work_out(f"The range is largest minus smallest: {high} - {low} = #")),
    ]
    return on_material(rng, ", ".join(map(str, numbers)), tasks)


def spelling(rng: random.Random) -> Draft:
    """Reverse a word, count its letters or count the words of a sentence."""
    if rng.random() < 0.3:
        subject, (_, _, past, thing) = rng.choice(tables.SUBJECTS), rng.choice(tables.ACTIONS)
        sentence = f"{cap(subject)} {past} {thing} {rng.choice(tables.MANNERS)}"
        parts = sentence.split()
        question = ask(rng, "How many words are in this sentence? {x}.|Count the words: {x}.", x=sentence)
        answer = f"The sentence has {len(parts)} words."
        return [(question, answer), ("And what is its last word?", f'Its last word is "{parts[-1]}".')]
    word = rng.choice(tables.WORDS)
    letter = rng.choice(word)
    times = {1: "once", 2: "twice"}.get(word.count(letter), f"{word.count(letter)} times")
    tasks = [
        ("spell this word backwards", word[::-1]),
        ("count the letters of this word", f'"{word}" has {len(word)} letters: {", ".join(word)}.'),
        (f'say how often the letter "{letter}" is in this word', f'The letter "{letter}" appears {times} in "{word}".'),
        ("list the vowels of this word in order", ", ".join(letter for letter in word if letter in "aeiou")),
        ("give the first and the last letter of this word", f'The first is "{word[0]}" and the last is "{word[-1]}".'),
        ("write this word in capital letters", word.upper()),
    ]
    return on_material(rng, word, tasks)


def rewriting(rng: random.Random) -> Draft:
    """Rewrite a sentence in another case, tense or form, or more politely."""
    if rng.random() < 0.2:
        first, second = rng.sample(tables.REQUESTS, 2)
        question = ask(rng, 'Make this more polite: "{x}."|Rewrite this as a polite request: "{x}."', x=cap(first))
        follow_up = (f'And this: "{cap(second)}."', f"Could you please {second}?")
        return [(question, f"Could you please {first}?"), follow_up]
    subject, manner = rng.choice(tables.SUBJECTS), rng.choice(tables.MANNERS)
    base, present, past, thing = rng.choice(tables.ACTIONS)
    start, end = cap(subject), f"{thing} {manner}"
    sentence = f"{start} {present} {end}."
    tasks = [
        ("rewrite this sentence in the past tense", f"{start} {past} {end}."),
        ("put this sentence into the future tense", f"{start} will {base} {end}."),
        ("turn this sentence into a question", f"Does {subject} {base} {end}?"),
        ("make this sentence negative", f"{start} does not {base} {end}."),
        ("write this sentence in upper case", sentence.upper()),
        ("write this sentence in lower case", sentence.lower()),
        ("write this sentence in title case, with a capital letter on every word", string.capwords(sentence)),
    ]
    if rng.random() < 0.15:
        forms = "Fix the capital letters and the full stop: {x}|Correct this sentence: {x}"
        return [(ask(rng, forms, x=sentence.lower()[:-1]), sentence), ("Now in the past tense.", tasks[0][1])]
    return on_material(rng, sentence, tasks)


def word_forms(rng: random.Random) -> Draft:
    """Give opposites, plurals or past tenses."""
    label, entries = rng.choice(
        (("opposite", tables.OPPOSITES), ("plural", tables.PLURALS), ("simple past", tables.PAST))
    )
    (word, form), (word_2, form_2), *more = rng.sample(entries, 5)
    follow_up = (f'And the {label} of "{word_2}"?', f'The {label} of "{word_2}" is "{form_2}".')
    if rng.random() < 0.55:
        shown = ", ".join(given for given, _ in more)
        question = ask(rng, "Give the {x} of each word: {y}|What is the {x} of each of these? {y}", x=label, y=shown)
        return [(question, "\n".join(f"{given}: {wanted}" for given, wanted in more)), follow_up]
    forms = 'What is the {x} of "{y}"?|Tell me the {x} of the word "{y}".|Which word is the {x} of "{y}"?'
    return [(ask(rng, forms, x=label, y=word), f'The {label} of "{word}" is "{form}".'), follow_up]


def emails(rng: random.Random) -> Draft:
    """Draft a short, polite email."""
    values = {"day": rng.choice(tables.DAYS[:5]), "topic": rng.choice(tables.TOPIC_NAMES)}
    task, subject, body = (text.format(**values) for text in rng.choice(tables.EMAILS))
    to, name, (extra, sentence) = rng.choice(tables.TITLED), rng.choice(tables.NAMES), rng.choice(tables.EXTRAS)
    forms = (
        "Write a short, polite email to {to} {x}. Sign it as {me}.|Draft a polite email to {to} {x}. My name is {me}.|"
        "Can you write an email to {to} {x}? It is from {me}."
    )
    letter = "Subject: {}\n\nDear {},\n\n{}\n\nKind regards,\n{}"
    return [
        (ask(rng, forms, to=to, x=task, me=name), letter.format(subject, to, body, name)),
        (f"Please add that {extra}.", letter.format(subject, to, f"{body} {sentence}", name)),
    ]


def record(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Make a sentence and the fields it states."""
    name, (city, city_2), day = rng.choice(tables.NAMES), rng.sample(tables.CITIES, 2), rng.choice(tables.DAYS)
    time, number, amount = clock(rng.randrange(8 * 60, 20 * 60, 15)), rng.randint(10000, 99999), rng.randint(2, 9)
    thing, job, topic = rng.choice(tables.PRODUCTS), rng.choice(tables.JOBS), rng.choice(tables.TOPIC_NAMES)
    age, phone, email = rng.randint(21, 64), f"555-01{rng.randint(10, 99)}", f"{name.lower()}@example.com"
    return rng.choice(
        (
            (
                f"{name} ordered {count(amount, thing)} on {day}, and the order number is {number}.",
                {"customer": name, "quantity": amount, "day": day, "order number": number},
            ),
            (
                f"{name} is flying from {city} to {city_2} on {day} at {time}.",
                {"traveller": name, "origin": city, "destination": city_2, "day": day, "time": time},
            ),
            (
                f"You can reach {name} in {city} at {email} or by phone on {phone}.",
                {"name": name, "city": city, "email address": email, "phone number": phone},
            ),
            (
                f"The meeting about {topic} is in room {amount} on {day} at {time}.",
                {"topic": topic, "room number": amount, "day": day, "time": time},
            ),
            (
                f"{name} is {age} years old, lives in {city} and works as {with_article(job)}.",
                {"name": name, "age": age, "city": city, "job": job},
            ),
        )
    )


def extraction(rng: random.Random) -> Draft:
    """Take one or two fields out of a sentence."""
    sentence, fields = record(rng)
    (field, value), (field_2, value_2), *others = rng.sample(list(fields.items()), 4)
    follow_ups = [(f"And the {other}?", str(fact)) for other, fact in others]
    if rng.random() < 0.4:
        forms = "Extract the {a} and the {b} from this sentence: {x}|Find the {a} and the {b}.\n\n{x}"
        answer = f"{cap(field)}: {value}\n{cap(field_2)}: {value_2}"
        return [(ask(rng, forms, a=field, b=field_2, x=sentence), answer), *follow_ups]
    forms = 'Extract the {a} from this sentence: {x}|Find the {a} in this text: {x}|"{x}"\n\nGive me only the {a}.'
    return [(ask(rng, forms, a=field, x=sentence), str(value)), *follow_ups]


def to_json(rng: random.Random) -> Draft:
    """Write the facts of a sentence or a list as JSON."""
    sentence, fields = record(rng)
    data = {field.replace(" ", "_"): value for field, value in fields.items()}
    indent = rng.choice((None, 2))
    forms = "Turn this sentence into JSON with the keys {keys}: {x}|{x}\n\nWrite this as JSON. Use the keys {keys}."
    if rng.random() < 0.4:
        forms = "Format these facts as JSON: {facts}|Convert this to a JSON object: {facts}"
    facts = "; ".join(f"{key} = {value}" for key, value in data.items()) + "."
    question = ask(rng, forms, keys=quoted(list(data)), x=sentence, facts=facts)
    question += " Put everything on one line." if indent is None else ""
    extra, flag = rng.choice(("confirmed", "archived", "urgent")), rng.choice((True, False))
    follow_up = f'Now add the key "{extra}" with the value {json.dumps(flag)}.'
    return [(question, json.dumps(data, indent=indent)), (follow_up, json.dumps(data | {extra: flag}, indent=indent))]


def sentiment(rng: random.Random) -> Draft:
    """Label the sentiment of one or of three sentences."""
    labels, sentences, reasons = [], [], []
    for thing, fact in rng.sample(tables.REVIEWED, 3):
        label = rng.choice(("Positive", "Negative", "Neutral"))
        word = rng.choice(tables.PRAISE if label == "Positive" else tables.BLAME)
        template = rng.choice(tables.OPINIONS[label])
        labels.append(label)
        sentences.append(template.format(thing=thing, fact=fact, word=word, a_word=with_article(word)))
        feeling = "pleased" if label == "Positive" else "unhappy"
        neutral = "The sentence states a fact and gives no opinion."
        reasons.append(neutral if label == "Neutral" else f'The word "{word}" shows that the writer is {feeling}.')
    kind = rng.randrange(3)
    if kind == 0:
        task = ask(
            rng, "Classify each sentence as positive, negative or neutral.|Label the sentiment of each sentence."
        )
        why = ("Why did you choose that label for the first one?", reasons[0])
        return [(f"{task}\n\n{numbered(sentences)}", numbered(labels)), why]
    if kind == 1:
        forms = "Is this sentence positive, negative or neutral, and why? {x}|Label the sentiment and say why: {x}"
        answers = [f"{label}. {reason}" for label, reason in zip(labels, reasons, strict=True)]
    else:
        forms = 'What is the sentiment of this sentence? "{x}"|Classify as positive, negative or neutral: "{x}"'
        answers = labels
    first = (ask(rng, forms, x=sentences[0]), answers[0])
    return [first, *((f"And this one: {sentences[i]}", answers[i]) for i in (1, 2))]
