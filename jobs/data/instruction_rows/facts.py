"""Topics about facts and numbers: each function makes one question with its answer, and follow-ups."""

import calendar
import datetime
import math
import random
from fractions import Fraction

from . import tables
from .words import Draft, ask, cap, clock, count, num, numbered, plural, stop, value_of, with_article, work_out


def capitals(rng: random.Random) -> Draft:
    """Ask for a capital, for the country of a capital, or whether a city is a capital."""
    (continent, country, city), (continent_2, country_2, city_2) = rng.sample(tables.CAPITALS, 2)
    plain, full = f"{city} is the capital of {country}", f"{city} is the capital of {country}, a country in {continent}"
    forms = "What is the capital of {0}?|Can you tell me the capital of {0}?|What's the capital city of {0}?"
    question, answer = forms.split("|")[rng.randrange(3)].format(country), f"The capital of {country} is {city}"
    if rng.random() < 0.4:
        forms = "Which country has {city} as its capital?|{city} is the capital of which country?"
        question, answer = ask(rng, forms, city=city), rng.choice((plain, full))
    elif rng.random() < 0.3:
        country, wrong = rng.choice(tables.NOT_CAPITALS)
        city = next(capital for _, name, capital in tables.CAPITALS if name == country)
        guess = rng.choice((city, wrong))
        question, answer = f"Is {guess} the capital of {country}?", f"Yes, {city} is the capital of {country}"
        if guess == wrong:
            answer = f"No, the capital of {country} is {city}, not {wrong}"
    return [
        (question, stop(answer)),
        (f"And what is the capital of {country_2}?", stop(f"The capital of {country_2} is {city_2}")),
        (f"Which continent is {country_2} in?", f"{cap(country_2)} is in {continent_2}."),
    ]


def arithmetic(rng: random.Random) -> Draft:
    """Pose a word problem or a plain sum, with a short worked answer."""
    thing, (name, friend), n = rng.choice(tables.THINGS), rng.sample(tables.NAMES, 2), rng.randint(15, 60)
    a, b, c = rng.sample(range(2, 13), 3)
    part, whole = rng.choice((("half", 2), ("a third", 3), ("a quarter", 4), ("a fifth", 5)))
    low, cyclists, bags = n - rng.randint(1, 12), rng.randint(4, 9), rng.randint(13, 30)
    values = {"a_things": count(a, thing), "c_things": count(c, thing), "a_thing": with_article(thing)} | {
        "things": plural(thing), "name": name, "friend": friend, "n": n, "a": a, "b": b, "c": c, "low": low,
        "high": n + n - low + 3 * rng.randint(1, 5), "each": n // a, "left": n % a or "none", "more": n // a + 1,
        "speed": rng.randrange(30, 121, 10), "price": rng.randrange(20, 201, 20),
        "percent": rng.choice((10, 20, 25, 50)), "part": part,
        "whole": whole, "cyclists": cyclists, "pupils": cyclists * whole, "younger": n - a,
        "bags": bags, "total": bags * a,
    }  # fmt: skip
    question, answer, question_2, answer_2 = rng.choice(tables.PROBLEMS)
    start, minutes = rng.randrange(14 * 60, 21 * 60, 5), rng.randrange(65, 120, 5)
    if rng.random() < 0.07:
        question = f"A film starts at {clock(start)} and lasts {minutes} minutes. When does it end?"
        answer = f"{minutes} minutes is 1 hour and {minutes - 60} minutes, so it ends at {clock(start + minutes)}."
        question_2 = "And if it starts half an hour later?"
        answer_2 = f"Then it also ends half an hour later, at {clock(start + minutes + 30)}."
    lines = [work_out(text.format(**values)) for text in (question, answer, question_2, answer_2)]
    return [(lines[0], lines[1]), (lines[2], lines[3])]


def units(rng: random.Random) -> Draft:
    """Convert between units, up or down, or from degrees Celsius to Fahrenheit."""
    amounts = rng.sample(range(2, 31), 2)
    if rng.random() < 0.1:
        question = ask(rng, "Convert {c} °C to Fahrenheit.|What is {c} degrees Celsius in Fahrenheit?", c=amounts[0])
        rule = "Multiply by 9, divide by 5 and add 32: "
        first, second = (work_out(f"{c} × 9 ÷ 5 + 32 = #, so {c} °C is # °F.") for c in amounts)
        return [(question, rule + first), (f"And {amounts[1]} °C?", second)]
    big, small, factor = rng.choice(tables.UNITS)
    about, factor = factor.startswith("~"), factor.removeprefix("~")
    up = "." not in factor and rng.random() < 0.4
    conversions = []
    for amount in amounts:
        number = amount * int(factor) if up else amount
        given, target = count(number, small if up else big), plural(big if up else small)
        result = num(round(value_of(f"{number} {'÷' if up else '×'} {factor}"), 1 if about else 6))
        link = f"{'÷' if up else '×'} {factor}{', about' if about else ' ='} {result}"
        conversions.append((given, target, f"{given} is {number} {link} {target}."))
    (given, target, answer), (given_2, _, answer_2) = conversions
    forms = "Convert {0} to {1}.|How many {1} are there in {0}?|What is {0} in {1}?|Please convert {0} into {1}."
    question = rng.choice(forms.split("|")).format(given, target)
    fact = f"1 {big} is {'about ' if about else ''}{count(Fraction(factor), small)}"
    return [(question, f"{fact}, so {answer}"), (f"And {given_2}?", answer_2)]


def concepts(rng: random.Random) -> Draft:
    """Explain a word, or find the word for a description."""
    start = rng.randrange(len(tables.CONCEPTS) - 5)  # entries close to each other are about similar things
    (term, meaning, detail), (term_2, meaning_2, detail_2) = rng.sample(tables.CONCEPTS[start : start + 6], 2)
    follow_up = (f"And what is {term_2}?", f"{cap(term_2)} is {meaning_2}. {detail_2}")
    if rng.random() < 0.25:
        forms = "What do we call {x}?|Which word or term means this: {x}?"
        return [(ask(rng, forms, x=meaning), f"That is {term.removesuffix(' in programming')}. {detail}"), follow_up]
    forms = (
        "What is {x}?|Explain in one or two sentences what {x} is.|Can you tell me what {x} is?|What is {x}, in short?|"
        "In simple words, what is {x}?|How would you explain {x} to a beginner?|Please define {x}."
    )
    return [(ask(rng, forms, x=term), f"{cap(term)} is {meaning}. {detail}"), follow_up]


def how_to(rng: random.Random) -> Draft:
    """Give short steps for an everyday task."""
    goal, text = rng.choice(tables.HOW_TO)
    steps = text.split("; ")
    low = [step[0].lower() + step[1:] for step in steps]
    forms = "How do I {x}?|How can I {x}?|Give me short steps to {x}.|What is a good way to {x}?|Tell me how to {x}."
    return [
        (ask(rng, forms, x=goal), numbered([f"{step}." for step in steps])),
        ("Can you say that in one sentence?", f"{cap(low[0])}, {low[1]}, {low[2]}, and finally {low[3]}."),
        ("What comes right after the second step?", f"The third step comes next: {low[2]}."),
    ]


def comparisons(rng: random.Random) -> Draft:
    """Compare two things from a table, two fractions or two quantities."""
    if rng.random() < 0.4:
        (one, two, text), (one_2, two_2, text_2) = rng.sample(tables.DIFFERENCES, 2)
        forms = "What is the difference between {a} and {b}?|How does {a} differ from {b}?|Compare {a} with {b}."
        follow_up = f"And what is the difference between {one_2} and {two_2}?"
        return [(ask(rng, forms, a=one, b=two), text), (follow_up, text_2)]
    if rng.random() < 0.5:
        left, right = (Fraction(rng.randint(1, whole - 1), whole) for whole in rng.sample(range(2, 11), 2))
        shared = math.lcm(left.denominator, right.denominator)
        same = [f"{part} is {part * shared}/{shared}" for part in (left, right) if part.denominator != shared]
        if same:
            question = ask(rng, "Which is larger, {a} or {b}?|Is {a} larger or smaller than {b}?", a=left, b=right)
            answer = f"{' and '.join(same)}, so {max(left, right)} is larger than {min(left, right)}."
            return [(question, answer), ("By how much?", f"The difference is {abs(left - right)}.")]
    word, big, small, factor = rng.choice(tables.QUANTITIES)
    n, more = rng.randint(2, 9), rng.choice((-1, 1)) * rng.randint(1, 9) * int(factor) // 20
    one, two = count(n, big), count(n * int(factor) + more, small)
    answer = f"{one} is {count(n * int(factor), small)}, so {two if more > 0 else one} is {word}."
    question = ask(rng, "Which is {w}: {a} or {b}?|What is {w}, {b} or {a}?", w=word, a=one, b=two)
    return [(question, answer), ("By how much?", f"By {count(abs(more), small)}.")]


def python_code(rng: random.Random) -> Draft:
    """Show a short Python example, or say what one line of Python prints."""
    if rng.random() < 0.6:
        (task, code, why), (task_2, code_2, why_2) = rng.sample(tables.SNIPPETS, 2)
        forms = "How do I {x} in Python?|Show me how to {x} in Python.|Write a short Python example to {x}."
        block = "```python\n{}\n```\n\n{}"
        return [
            (ask(rng, forms, x=task), block.format(code, why)),
            (f"And how do I {task_2}?", block.format(code_2, why_2)),
        ]
    word, other, items = *rng.sample(tables.WORDS, 2), rng.sample(range(1, 50), 4)
    a, b, stop_at = rng.randint(20, 99), rng.randint(3, 9), rng.randint(3, 7)
    lines = [
        (f'print(len("{word}"))', len(word), f'`len` counts the characters of "{word}"'),
        (f'print("{word}".upper())', word.upper(), "`upper` turns every letter into a capital"),
        (f'print("{word}"[0])', word[0], "index 0 is the first character"),
        (f'print("{word}"[::-1])', word[::-1], "a slice with step -1 runs backwards"),
        (f'print("{word}" + "{other}")', word + other, "`+` joins two strings without a space"),
        (f"print(sorted({items}))", sorted(items), "`sorted` puts the items in rising order"),
        (f"print(sum({items}))", sum(items), "`sum` adds all the items"),
        (f"print(max({items}))", max(items), "`max` returns the largest item"),
        (f"print({items}[-1])", items[-1], "index -1 is the last item"),
        (f"print({a} // {b})", a // b, "`//` divides and rounds down to a whole number"),
        (f"print({a} % {b})", a % b, "`%` gives the remainder of the division"),
        (f"print(list(range({stop_at})))", list(range(stop_at)), "`range` counts from 0 and leaves out its end"),
    ]
    (code, result, why), (code_2, result_2, why_2) = rng.sample(lines, 2)
    question = ask(rng, "What does this Python line print?\n\n{x}|What is the output of `{x}` in Python?", x=code)
    return [
        (question, f"It prints `{result}`, because {why}."),
        (f"And `{code_2}`?", f"That prints `{result_2}`, because {why_2}."),
    ]


def dates(rng: random.Random) -> Draft:
    """Ask about days of the week, months, leap years, or the date some days later."""
    today, n, month, year = rng.randrange(7), rng.randint(2, 40), rng.randrange(12), rng.randint(2001, 2099)
    weekday, later, (weeks, rest) = tables.DAYS[today], tables.DAYS[(today + n) % 7], divmod(n, 7)
    before, name, after = (tables.MONTHS[(month + step) % 12] for step in (-1, 0, 1))
    length = "28 days, or 29 in a leap year" if month == 1 else f"{calendar.monthrange(2023, month + 1)[1]} days"
    kind = rng.randrange(6)
    if kind == 0:
        answer = f"{n} days is {count(weeks, 'week')} and {count(rest, 'day')}, so it will be {later}."
        if rest == 0:
            answer = f"{n} days is exactly {count(weeks, 'week')}, so it will be {later} again."
        elif weeks == 0:
            answer = f"Counting on {n} days from {weekday}, it will be {later}."
        forms = "If today is {x}, what day will it be in {n} days?|Today is {x}. Which day is it {n} days from now?"
        question = ask(rng, forms, x=weekday, n=n)
        return [(question, answer), ("And what day was yesterday?", f"Yesterday was {tables.DAYS[today - 1]}.")]
    if kind == 1:
        forms = "How many days does {x} have?|How long is the month of {x}?|How many days are in {x}?"
        question = ask(rng, forms, x=name)
        return [(question, f"{name} has {length}."), ("Which month comes next?", f"{after} comes after {name}.")]
    if kind == 2:
        question = ask(rng, "Which month comes before {x}?|What is the month before {x}?", x=name)
        return [(question, f"{before} comes before {name}."), ("And after it?", f"{after} comes after {name}.")]
    if kind == 3:
        question = ask(rng, "What is the {x} month of the year?|Which month is the {x} one?", x=tables.ORDINALS[month])
        return [(question, f"It is {name}."), ("How many days does it have?", f"{name} has {length}.")]
    if kind == 4:
        verdict = "Yes, {0} is a leap year, because it can" if calendar.isleap(year) else "No, because {0} cannot"
        follow_up = ("How many days does that year have?", f"It has {365 + calendar.isleap(year)} days.")
        return [(f"Is {year} a leap year?", f"{verdict.format(year)} be divided evenly by 4."), follow_up]
    start = datetime.date(2023, month + 1, rng.randint(1, 27))
    first, then, last = (
        f"{day.day} {tables.MONTHS[day.month - 1]} {day.year}"
        for day in (start, start + datetime.timedelta(days=n), start + datetime.timedelta(days=n + 7))
    )
    question = ask(rng, "What date is {n} days after {x}?|Which date comes {n} days after {x}?", n=n, x=first)
    return [(question, f"{n} days after {first} is {then}."), ("And a week after that?", f"That is {last}.")]
