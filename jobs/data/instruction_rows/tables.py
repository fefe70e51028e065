"""The tables of make_instructions.py: curated facts and wordings, so that the rows made from them are right."""

from .words import pairs, phrases, table

CAPITALS = [
    (continent, country, city)
    for continent, text in table("""
Europe | Austria:Vienna, Belgium:Brussels, Bulgaria:Sofia, Croatia:Zagreb, Czechia:Prague, Denmark:Copenhagen,
    Estonia:Tallinn, Finland:Helsinki, France:Paris, Germany:Berlin, Greece:Athens, Hungary:Budapest, Iceland:Reykjavik,
    Ireland:Dublin, Italy:Rome, Latvia:Riga, Norway:Oslo, Poland:Warsaw, Portugal:Lisbon, Romania:Bucharest,
    Slovenia:Ljubljana, Spain:Madrid, Sweden:Stockholm, the United Kingdom:London
Asia | China:Beijing, India:New Delhi, Japan:Tokyo, Jordan:Amman, Lebanon:Beirut, Mongolia:Ulaanbaatar, Nepal:Kathmandu,
    Oman:Muscat, Pakistan:Islamabad, the Philippines:Manila, Qatar:Doha, South Korea:Seoul, Thailand:Bangkok,
    Vietnam:Hanoi
Africa | Algeria:Algiers, Angola:Luanda, Ethiopia:Addis Ababa, Ghana:Accra, Kenya:Nairobi, Morocco:Rabat,
    Namibia:Windhoek, Nigeria:Abuja, Rwanda:Kigali, Senegal:Dakar, Tunisia:Tunis, Uganda:Kampala, Zambia:Lusaka
South America | Argentina:Buenos Aires, Brazil:Brasília, Chile:Santiago, Colombia:Bogotá, Ecuador:Quito,
    Paraguay:Asunción, Peru:Lima, Uruguay:Montevideo, Venezuela:Caracas
North America | Canada:Ottawa, Costa Rica:San José, Cuba:Havana, Jamaica:Kingston, Mexico:Mexico City,
    Nicaragua:Managua, the United States:Washington D.C.
Oceania | Australia:Canberra, Fiji:Suva, New Zealand:Wellington, Papua New Guinea:Port Moresby, Samoa:Apia
""")
    for country, city in pairs(text)
]
NOT_CAPITALS = pairs("""Australia:Sydney, Brazil:Rio de Janeiro, Canada:Toronto, China:Shanghai, Ecuador:Guayaquil,
    Germany:Munich, India:Mumbai, Italy:Milan, Morocco:Casablanca, New Zealand:Auckland, Nigeria:Lagos,
    Pakistan:Karachi, Poland:Kraków, Spain:Barcelona, the United States:New York City, Vietnam:Ho Chi Minh City""")

CONCEPTS = table("""
gravity | the force that pulls objects with mass towards one another | It keeps the planets in orbit around the Sun.
photosynthesis | the process by which plants use sunlight to make sugar | It takes in carbon dioxide and gives off
    oxygen.
evaporation | the change of a liquid into a gas at its surface | It is why a puddle dries up on a warm day.
condensation | the change of a gas into a liquid as it cools | It is why a cold glass gets wet on the outside.
friction | the force that resists motion between surfaces that touch | It lets our shoes grip the ground.
an atom | the smallest unit of a chemical element | It has a tiny nucleus with electrons around it.
a molecule | a group of atoms held together by chemical bonds | A water molecule has two hydrogen atoms and one of
    oxygen.
a cell | the basic building block of all living things | Bacteria have just one, while a human body has trillions.
DNA | the molecule that carries the genetic instructions of living things | It has the shape of a double helix.
evolution | the gradual change of species over many generations | Natural selection is one of its main causes.
a volcano | an opening in the Earth's crust that lets out lava, ash and gas | It often has the shape of a mountain.
an earthquake | a shaking of the ground when rock underground moves suddenly | Strong ones can damage buildings.
a galaxy | a huge system of stars, gas and dust held together by gravity | Ours is called the Milky Way.
a comet | a small body of ice and dust that orbits the Sun | It grows a bright tail when it comes close to the Sun.
a fossil | the preserved trace of a plant or animal that lived long ago | It tells scientists about life in the past.
an ecosystem | a community of living things together with their surroundings | A pond and a forest are examples.
a vaccine | a substance that trains the immune system to fight a disease | It helps people to avoid serious illness.
a hypothesis | a proposed explanation that can be tested | Scientists check it with experiments or observations.
a magnet | an object that attracts iron and a few other metals | It has a north pole and a south pole.
density | the amount of mass in a given volume | Oil floats on water because it has a lower density.
a mammal | a warm-blooded animal that feeds its young with milk | Whales, bats and humans are all examples.
a habitat | the natural home of a plant or animal | The desert is one for camels, and the reef is one for many fish.
the water cycle | the movement of water between the sea, the air and the land | Rain is one part of it.
an algorithm | a step-by-step procedure for solving a problem | A recipe works in much the same way.
a variable | a name for a value in a program | The value can change while the program runs.
a function in programming | a named piece of code that does one job | It can take inputs and return a result.
a loop in programming | a piece of code that runs again and again | It stops when its condition is no longer met.
a software bug | a mistake in a program that makes it behave wrongly | Tests help to find it before users do.
a database | an organised collection of data that can be searched and changed | Shops use one to keep track of orders.
a web browser | a program for opening and reading web pages | Firefox and Chrome are well-known examples.
an operating system | the software that manages a computer and runs its programs | Linux and Windows are examples.
encryption | the process of scrambling data so that only the right key can read it | It keeps private messages private.
a compiler | a program that translates source code into machine code | The C language is normally used with one.
an IP address | a number that identifies a device on a network | It lets data find its way to that device.
a URL | the address of a page or file on the web | It usually starts with "https://".
RAM | the fast memory that holds the data a computer is working on | It loses its contents when the power goes off.
cloud computing | the use of remote computers over the internet to store or process data | You pay for what you use.
machine learning | a way of building programs that learn patterns from data | Spam filters are a common use of it.
a neural network | a model made of layers of simple connected units | It learns by adjusting the strength of the
    connections.
a GPU | a processor built to do many calculations at the same time | It is used for graphics and for machine learning.
open-source software | software whose source code anyone may read, change and share | Python and Linux are examples.
version control | a system that records every change to a set of files | Git is the best-known tool for it.
a backup | a spare copy of data in case the original is lost | It is best kept in a different place.
a pixel | the smallest dot of a digital picture | A photo from a phone has millions of them.
a byte | a group of eight bits | It can hold one of 256 different values.
an API | a set of rules that lets one program talk to another | A weather app uses one to fetch the forecast.
a spreadsheet | a document that arranges data in rows and columns | It can also calculate totals and draw charts.
inflation | a general rise in prices over time | It means that the same amount of money buys less.
a budget | a plan for how to spend and save money | It lists what comes in and what goes out.
a recipe | a set of instructions for making a dish | It names the ingredients and then the steps.
a receipt | a written record that something has been paid for | You may need it to return a product.
a contract | an agreement that the law can enforce | It says what each side must do.
a mortgage | a loan for buying a home | The home can be taken by the lender if the loan is not repaid.
insurance | a service that pays for certain losses in return for a regular fee | Many drivers must have it by law.
recycling | the process of turning waste into new material | Paper, glass and metal are often treated this way.
compost | rotted plant material that feeds the soil | Gardeners make it from leaves and kitchen scraps.
an election | a vote in which people choose who will hold an office | Most are held every few years.
a democracy | a system of government in which the people choose their leaders | Free elections are a key part of it.
a deadline | the latest time by which something must be done | It helps people to plan their work.
a metaphor | a figure of speech that describes one thing as if it were another | "Time is money" is an example.
a synonym | a word that means nearly the same as another word | "Big" and "large" are an example of such a pair.
a proverb | a short, well-known saying that gives advice | "Better late than never" is one.
a habit | something that a person does often and almost without thinking | It becomes stronger each time it is repeated.
a thermometer | an instrument that measures temperature | Doctors use one to check for fever.
a compass | an instrument that shows which way is north | Its needle lines up with the Earth's magnetic field.
a passport | an official document that proves who you are when you travel abroad | It is issued by your country.
a warranty | a promise to repair or replace a product that fails | It usually lasts for a fixed time.
yeast | a tiny fungus that makes bread dough rise | It does this by turning sugar into carbon dioxide gas.
""")

HOW_TO = table("""
boil an egg | Bring a pan of water to the boil; Lower the egg in with a spoon; Cook it for about eight minutes; Cool it
    in cold water before you peel it
make a cup of tea | Boil some fresh water; Put a tea bag in a cup; Pour in the water and wait three minutes; Take out
    the tea bag and add milk or sugar if you like
change a light bulb | Switch off the light and let the bulb cool; Take out the old bulb; Fit a new bulb of the same
    type; Switch the light back on
plant a seed | Fill a small pot with moist soil; Make a shallow hole and drop the seed in; Cover it lightly with soil;
    Water it and put the pot in a bright place
wash a window | Dust the frame; Wipe the glass with warm soapy water; Rinse it with clean water; Dry it with a soft
    cloth
pack for a short trip | Check the weather forecast; List what you need for each day; Roll your clothes to save space;
    Put your documents and charger in last
choose a strong password | Pick four or more unrelated words; Add a number or symbol; Use it for one account only; Store
    it in a password manager
back up your files | Decide which files matter; Copy them to an external drive or the cloud; Open a few copies to test
    them; Repeat this every week
prepare for a job interview | Read about the company; Practise answers to common questions; Plan how to get there in
    time; Write down two questions to ask
stay focused while studying | Put your phone in another room; Set one clear goal; Work for 25 minutes; Take a
    five-minute break and start again
fall asleep more easily | Go to bed at the same time each night; Avoid coffee in the evening; Put screens away early;
    Keep the room dark and cool
wash your hands properly | Wet your hands and add soap; Rub all sides for 20 seconds; Rinse them well; Dry them with a
    clean towel
cook rice | Rinse the rice; Add two cups of water for each cup of rice; Simmer it with the lid on until the water is
    gone; Let it rest for five minutes
iron a shirt | Set the iron to suit the fabric; Start with the collar and cuffs; Do the sleeves and then the body; Hang
    the shirt up at once
start running | Buy shoes that fit well; Begin with short runs and walking breaks; Run three times a week; Add a little
    distance each week
plan a birthday party | Choose a date and a place; Invite your guests; Plan the food and some games; Prepare the room on
    the day
fix a flat bicycle tyre | Take off the wheel and the inner tube; Find the hole with air and water; Patch it and let it
    dry; Put the tube and wheel back and pump up the tyre
wrap a present | Cut paper that goes around the box; Fold it over and tape it; Fold in the two ends and tape them; Add a
    ribbon and a card
make a simple budget | Write down your monthly income; List your fixed costs; Set limits for everything else; Compare
    the plan with what you really spend
proofread a text | Leave it alone for an hour; Read it aloud slowly; Fix one kind of mistake at a time; Ask someone else
    to read it too
give a short talk | Decide on one main message; Make notes with three key points; Practise aloud with a timer; Speak
    slowly and look at the audience
save water at home | Take shorter showers; Turn off the tap while brushing your teeth; Repair dripping taps; Run the
    washing machine only when it is full
learn new words in a language | Choose ten useful words; Write each one on a card; Test yourself every day; Use the
    words in your own sentences
take a better photo | Wipe the lens; Put the light behind you; Move closer to your subject; Hold still while you press
    the button
""")

DIFFERENCES = table("""
weather | climate | Weather is what the air does from day to day, while climate is the usual pattern over many years.
a virus | a bacterium | A bacterium is a living cell that can multiply by itself, while a virus needs to enter a host
    cell.
RAM | disk storage | RAM is fast but loses everything without power, while disk storage is slower but keeps its data.
a list | a tuple in Python | A list can be changed after it is made, while a tuple cannot.
HTTP | HTTPS | Both carry web pages, but HTTPS also encrypts the traffic so that others cannot read it.
a star | a planet | A star makes its own light, while a planet only reflects the light of its star.
speed | velocity | Speed says how fast something moves, while velocity also says in which direction.
mass | weight | Mass is the amount of matter in an object, while weight is the pull of gravity on it.
a city | a village | Both are places where people live, but a city is much larger and has more services.
tea | coffee | Tea is made from leaves and coffee from roasted beans, and a cup of coffee usually has more caffeine.
a debit card | a credit card | A debit card takes money from your account at once, while a credit card lets you pay
    later.
a compiler | an interpreter | A compiler translates a whole program before it runs, while an interpreter runs it step by
    step.
a fruit | a vegetable | In botany, a fruit is the part of a plant that holds the seeds, while vegetables are other parts
    that we eat, such as roots, stems and leaves.
a frog | a toad | A frog usually has smooth, moist skin and jumps, while a toad has dry, bumpy skin and tends to walk.
an island | a peninsula | An island has water on all sides, while a peninsula is joined to the mainland on one side.
a novel | a short story | Both tell a made-up story, but a novel is far longer and often follows many characters.
hardware | software | Hardware is the physical part of a computer, while software is the programs that run on it.
a simile | a metaphor | A simile compares with "like" or "as", while a metaphor says that one thing is another.
the mean | the median | The mean is the sum divided by the count, while the median is the middle value in sorted order.
precision | accuracy | Accuracy is how close results are to the truth, and precision is how close they are to one
    another.
""")

SNIPPETS = table(r"""
add up the numbers in a list | total = sum([4, 8, 15])\nprint(total) | `sum` adds all the items, so this prints 27.
reverse a string | text = "loom"\nprint(text[::-1])
    | The slice `[::-1]` walks through the string backwards, so this prints `mool`.
count the words in a sentence | sentence = "the sun is warm"\nprint(len(sentence.split()))
    | `split` cuts the sentence at spaces and `len` counts the parts, so this prints 4.
check whether a number is even | def is_even(number):\n    return number % 2 == 0
    | The remainder after dividing by 2 is 0 only for even numbers.
find the largest number in a list | numbers = [3, 9, 5]\nprint(max(numbers)) | `max` returns the largest item, here 9.
read a text file line by line | with open("notes.txt") as file:\n    for line in file:\n        print(line.rstrip())
    | The `with` block closes the file for you, and `rstrip` removes the line break.
sort a list of names | names = ["Mia", "Ali", "Zoe"]\nprint(sorted(names))
    | `sorted` returns a new list in alphabetical order and leaves `names` as it was.
make a list of squares | squares = [n * n for n in range(1, 6)]\nprint(squares)
    | The list comprehension builds `[1, 4, 9, 16, 25]`.
remove duplicates from a list | items = ["a", "b", "a"]\nunique = list(dict.fromkeys(items))
    | The keys of a dictionary are unique and keep their order, so `unique` is `["a", "b"]`.
count how often each letter occurs | from collections import Counter\nprint(Counter("banana"))
    | `Counter` counts each letter: three times "a", twice "n" and once "b".
handle a division by zero | try:\n    print(1 / 0)\nexcept ZeroDivisionError:\n    print("cannot divide by zero")
    | The error is caught, so the program prints a message and goes on.
merge two dictionaries | first = {"a": 1}\nsecond = {"b": 2}\nmerged = {**first, **second}
    | The two stars unpack each dictionary, so `merged` holds both keys.
loop over a list with its positions | for index, colour in enumerate(["red", "blue"]):\n    print(index, colour)
    | `enumerate` gives each item together with its position, starting at 0.
join words with commas | words = ["salt", "oil", "rice"]\nprint(", ".join(words))
    | `join` puts the text between the words, so this prints `salt, oil, rice`.
compute a factorial | def factorial(n):\n    return 1 if n < 2 else n * factorial(n - 1)
    | The function calls itself with smaller and smaller numbers, so `factorial(5)` is 120.
convert a string to a number | text = "42"\nnumber = int(text)
    | `int` turns the digits into a whole number; use `float` for decimals.
pick a random item from a list | import random\nprint(random.choice(["tea", "coffee", "water"]))
    | `random.choice` returns one of the items, each with the same chance.
check whether a word is a palindrome | def is_palindrome(word):\n    return word == word[::-1]
    | A palindrome reads the same in both directions, so it equals its reverse.
get today's date | from datetime import date\nprint(date.today())
    | `date.today` asks the system clock and prints the date as year, month and day.
save a dictionary as JSON | import json\n\nwith open("data.json", "w") as file:\n    json.dump({"name": "Ada"}, file)
    | `json.dump` writes the dictionary as JSON text into the open file.
""")

# "#" after a sum stands for its result, and any later "#" for the result before it.
PROBLEMS = table("""
{name} buys {a_things} at ${b} each. How much does {name} pay? | {a} × {b} = #, so {name} pays $#. | And for {c_things}?
    | {c} × {b} = #, so {name} would pay $#.
{name} buys {a_thing} for ${b} and pays with a $20 note. How much change does {name} get? | 20 - {b} = #, so {name} gets
    $# back. | What if it cost ${c}? | 20 - {c} = #, so the change would be $#.
{name} has {n} {things}, gives {a} to {friend} and then buys {b} more. How many does {name} have now? | {n} - {a} + {b}
    = #, so {name} has # {things} now. | And without buying more? | {n} - {a} = #, so {name} would have # {things}.
A train travels at {speed} km per hour. How far does it go in {a} hours? | {speed} × {a} = #, so it goes # km. | And in
    {c} hours? | {speed} × {c} = #, so it goes # km.
{a} children share {n} {things} equally. How many does each child get, and how many are left over? | {a} × {each} = #
    and {n} - # = #, so each child gets {each}, with {left} left over. | How many would be needed to give each child
    {more}? | {a} × {more} = #, so # {things} would be needed.
A jacket costs ${price} and is reduced by {percent} percent. What is the new price? | {price} × {percent} ÷ 100 = # and
    {price} - # = #, so the new price is $#. | How much did it cost before? | It cost ${price} before the reduction.
What is the average of {low}, {n} and {high}? | {low} + {n} + {high} = # and # ÷ 3 = #, so the average is #. | And what
    is their sum? | {low} + {n} + {high} = #, so their sum is #.
A rectangle is {n} cm long and {a} cm wide. What is its area? | {n} × {a} = #, so its area is # square centimetres. |
    And its perimeter? | {n} + {a} + {n} + {a} = #, so its perimeter is # cm.
There are {pupils} pupils in a class, and {part} of them cycle to school. How many cycle? | {pupils} ÷ {whole} = #, so #
    pupils cycle to school. | And how many do not? | {pupils} - {cyclists} = #, so # pupils do not cycle.
What is {speed} + {n}? | {speed} + {n} = # | And what is {n} - {a}? | {n} - {a} = #
What is {n} × {a}? | {n} × {a} = # | And what is {n} × {b}? | {n} × {b} = #
{name} is {n} years old, and {friend} is {a} years younger. How old is {friend}? | {n} - {a} = #, so {friend} is # years
    old. | How old are they together? | {n} + {younger} = #, so together they are # years old.
{name} reads {n} pages a day. How many pages is that in {a} days? | {n} × {a} = #, so {name} reads # pages in {a} days.
    | And in {b} days? | {n} × {b} = #, so {name} reads # pages in {b} days.
A baker packs {total} rolls into bags of {a}. How many bags are needed? | {total} ÷ {a} = #, so # bags are needed. |
    What if the baker sells {b} of the bags? | {bags} - {b} = #, so # bags would be left.
""")

EMAILS = table("""
asking for a day off on {day} | Day off on {day} | I would like to ask for a day off on {day}. I will finish my open
    tasks before then. Please let me know whether this suits you.
asking to move the meeting about {topic} to {day} | Meeting about {topic} | Would it be possible to move our meeting
    about {topic} to {day}? I am sorry for the change and hope that the new day works for you.
with thanks for the help with {topic} | Thank you for your help | Thank you very much for your help with {topic}. Your
    advice saved me a lot of time, and I am happy with the result.
asking for one more week for the work on {topic} | More time for {topic} | I am writing to ask for one more week for my
    work on {topic}. It is going well, and the extra time would let me check it with care.
with an apology for missing the meeting on {day} | Missed meeting on {day} | I am sorry that I missed our meeting on
    {day}. I should have let you know in good time. Could we find another time that suits you?
with an invitation to a talk about {topic} on {day} | Talk about {topic} on {day} | I would like to invite you to a talk
    about {topic} on {day}. We would be very glad to see you there. Please let me know whether you can come.
declining an invitation to dinner on {day} | Dinner on {day} | Thank you for your kind invitation to dinner on {day}.
    Unfortunately, I cannot come because I already have other plans. I hope that we can meet soon.
asking for comments by {day} on a draft about {topic} | Draft about {topic} | I have finished a first draft about
    {topic}. Would you have time to read it by {day}? Your comments would be very helpful.
asking for a reply by {day} to an earlier message about {topic} | Reminder about {topic} | I wrote to you last week
    about {topic} and would like to ask whether you have had time to look at it. I would be grateful for a short reply
    by {day}.
asking for a short call about {topic} on {day} | Call about {topic} | Would you have fifteen minutes on {day} for a call
    about {topic}? I have a few questions that are easier to discuss by phone.
""")
TOPIC_NAMES = phrases("""the budget, the new website, the sales report, the summer workshop, the training plan, the
    customer survey, the office move, the project schedule""")
EXTRAS = table("""
I can be reached by phone in the afternoon | You can reach me by phone in the afternoon.
I hope that all is well | I hope that all is well with you.
I send my best wishes to the team | Please give my best wishes to the team.
""")

NAMES = "Anna Ben Clara David Elif Farid Grace Hugo Ines Jonas Kofi Lena Maya Nina Omar Paula Ravi Sara Tom".split()
TITLED = ["Ms Keller", "Mr Brown", "Dr Lee", "Professor Okafor", "Mrs Silva", "Mr Tanaka", "Dr Haddad", "Ms Novak"]
THINGS = "apple book candle cookie cup lemon muffin notebook orange pencil plum postcard sticker ticket".split()
CITIES = "Athens Berlin Dublin Lisbon London Madrid Oslo Paris Prague Rome Vienna Warsaw Tokyo Seoul Nairobi".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
WORDS = """anchor basket bridge butter camera castle cherry cloud dragon eagle engine feather forest garden giraffe
    hammer harbour island jacket kettle ladder lantern marble meadow mirror needle ocean onion paper pepper planet
    pocket rabbit river rocket saddle silver spider summer temple tiger tunnel valley velvet violin walnut window
    winter yellow zebra""".split()

OPPOSITES = pairs("""hot:cold, early:late, tall:short, empty:full, heavy:light, fast:slow, open:closed, loud:quiet,
    strong:weak, wide:narrow, rich:poor, young:old, clean:dirty, soft:hard, deep:shallow, wet:dry, happy:sad,
    near:far, brave:cowardly, ancient:modern, cheap:expensive, polite:rude, safe:dangerous, thick:thin, sweet:bitter,
    rough:smooth, easy:difficult, noisy:quiet, visible:invisible, generous:stingy, absent:present, sharp:blunt,
    victory:defeat, arrive:leave, begin:end, borrow:lend, win:lose, buy:sell, remember:forget, accept:refuse,
    increase:decrease""")
PLURALS = pairs("""leaf:leaves, mouse:mice, child:children, foot:feet, tooth:teeth, goose:geese, city:cities,
    box:boxes, knife:knives, wolf:wolves, woman:women, man:men, sheep:sheep, potato:potatoes, tomato:tomatoes,
    baby:babies, key:keys, church:churches, bus:buses, photo:photos, shelf:shelves, loaf:loaves, half:halves, ox:oxen,
    deer:deer, story:stories, hero:heroes, dish:dishes, person:people, monkey:monkeys, thief:thieves, piano:pianos,
    crisis:crises, lady:ladies""")
PAST = pairs("""go:went, see:saw, take:took, write:wrote, buy:bought, bring:brought, think:thought, catch:caught,
    teach:taught, speak:spoke, begin:began, swim:swam, drive:drove, eat:ate, give:gave, know:knew, fly:flew,
    find:found, keep:kept, leave:left, lose:lost, make:made, run:ran, sell:sold, sleep:slept, stand:stood, tell:told,
    understand:understood, carry:carried, stop:stopped, try:tried, plan:planned, choose:chose, forget:forgot,
    break:broke, build:built""")

SUBJECTS = phrases("""the old farmer, my neighbour, the young doctor, our teacher, the gardener, a tall man, the new
    pilot, Maria, the baker, her brother, the shy student, their aunt""")
ACTIONS = pairs("""paint:paints:painted:the fence, write:writes:wrote:a long letter, read:reads:read:the newspaper,
    cook:cooks:cooked:a simple soup, fix:fixes:fixed:the old bicycle, carry:carries:carried:the heavy boxes,
    sing:sings:sang:a quiet song, draw:draws:drew:a small map, drink:drinks:drank:a cup of tea,
    clean:cleans:cleaned:the windows, feed:feeds:fed:the grey cat, buy:buys:bought:fresh bread, tell:tells:told:a
    funny story, wash:washes:washed:the red car, take:takes:took:a short walk, make:makes:made:a paper boat""")
MANNERS = phrases("""every morning, after lunch, before dinner, on Saturdays, every weekend, without any help, with
    great care, in the afternoon, with a smile, at home""")
REQUESTS = phrases("""send me the report, close the window, wait outside, call me back, help me with this form, reply
    by Friday, check the numbers again, turn down the music, bring your own lunch, move your car, speak more slowly,
    show me the way to the station, explain the last step, lend me your pen, sign the contract, book a table for
    four""")

UNITS = pairs("""kilometre:metre:1000, metre:centimetre:100, centimetre:millimetre:10, kilogram:gram:1000,
    tonne:kilogram:1000, litre:millilitre:1000, hour:minute:60, minute:second:60, day:hour:24, week:day:7,
    year:month:12, foot:inch:12, yard:foot:3, inch:centimetre:2.54, mile:kilometre:~1.6093, pound:kilogram:~0.4536,
    pound:ounce:16, kilobyte:byte:1000, gigabyte:megabyte:1000, century:year:100""")
QUANTITIES = pairs("""longer:hour:minute:60, longer:metre:centimetre:100, heavier:kilogram:gram:1000,
    longer:kilometre:metre:1000, more:litre:millilitre:1000, heavier:tonne:kilogram:1000""")

PRODUCTS = phrases("lamp, kettle, keyboard, backpack, office chair, headset, desk, suitcase")
JOBS = phrases("nurse, architect, teacher, engineer, baker, librarian, electrician, chemist, tailor, journalist")

PRAISE = "wonderful excellent delightful superb brilliant fantastic lovely impressive amazing".split()
BLAME = "terrible awful disappointing dreadful poor horrible unpleasant dull annoying".split()
REVIEWED = pairs("""film:is two hours long, book:has twelve chapters, hotel:is next to the station, restaurant:opens
    at noon, concert:starts at eight o'clock, museum:is closed on Mondays, course:lasts six weeks, phone:comes in
    black and white, train ride:takes forty minutes, play:has three acts, exhibition:runs until June, app:was released
    in March""")
OPINIONS = {
    "Positive": ("The {thing} was {word}.", "What {a_word} {thing}!",
                 "I loved the {thing}; it was {word} in every way.",
                 "My friends and I were happy because the {thing} was {word}.",
                 "The {thing} was {word}, and I would recommend it to anyone."),
    "Negative": ("The {thing} was {word}.", "What {a_word} {thing}!", "I regret choosing the {thing}; it was {word}.",
                 "The {thing} was {word}, and I want my money back.",
                 "Nobody in our family liked the {thing}, which was {word}."),
    "Neutral": ("The {thing} {fact}.", "According to the website, the {thing} {fact}.",
                "Please note that the {thing} {fact}."),
}  # fmt: skip
