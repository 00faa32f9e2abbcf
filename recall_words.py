"""What recall documents may say: word pools, wordings, and the rule that holds some of them out for tests.

Where it sits: **recall_words** -> recall.py, which draws the documents. This module is data and one rule, `held_out`:
person names, single-word values and wordings are held out as a whole; two-word values ("brass key") as combinations,
mostly of words that training has seen.
"""

import random
from collections.abc import Sequence

# ---- words. The pools of the first block are held out word by word and share no word with the others. ----

PEOPLE = """Margaret Edmund Alice Thomas Ruth Harold Helen Walter Clara Arthur Martha Henry Emily Albert Agnes George
Edith Charles Dorothy Samuel Eleanor Philip Florence Edward Beatrice Richard Harriet Robert Louisa Stephen Caroline
Simon Matilda Patrick Susan Martin Charlotte Daniel Rebecca Oliver Isabel Peter Lucy Matthew Julia Andrew Catherine
Joseph Frances Hugh Rachel Leonard Sarah Gilbert Judith Lawrence Amelia Ralph Gertrude Roger Winifred Herbert Adelaide
Francis Cecilia Alfred Bertha Ernest Constance Frederick Lydia Bernard Miriam Christopher Sophia Theodore Theresa
Nicholas Barbara Benjamin Augusta Nathaniel Rosalind Timothy Josephine Vincent Marion Sebastian Millicent Humphrey
Deborah Geoffrey Henrietta Godfrey Janet Rupert Muriel Reginald Phoebe Percy Sylvia Maurice Ursula Lionel Veronica
Clement Wilhelmina Cuthbert Angela Archibald Blanche Augustus Bridget Barnaby Celia Bartholomew Christina Basil
Cordelia Cecil Cynthia Claude Diana Conrad Dinah Cyril Dora David Elizabeth Dennis Ellen Duncan Elsie Edgar Emma Edwin
Esther Elliot Ethel Eustace Eva Felix Fanny Ferdinand Flora Gabriel Georgina Gerald Gwendolen Giles Hannah Gregory
Hester Harvey Hilda Hector Ida Horace Irene Hubert Isabella Ignatius Jane Isaac Jemima Jacob Jessica James Joan Jasper
Johanna Jeremy Katharine Jerome Laura John Leonora Jonathan Letitia Jonas Lilian Joshua Lucinda Julian Mabel Justin
Madeline Kenneth Marian Lambert Marjorie Leopold Maud Lewis Mildred Louis Minnie Lucas Monica Luke Nancy Luther Nora
Malcolm Olivia Marcus Pamela Michael Paula Miles Priscilla Norman Prudence Oscar Rosamond Oswald Sabina Paul Selina
Quentin Stella Raymond Susannah Roland Tabitha Rufus Thomasina Silas Victoria Solomon Viola Stanley Virginia""".split()
GOODS = """rope mirror candle book map ribbon pencil blanket umbrella hat coat scarf glove boot shoe belt shirt cloak
apron towel broom brush comb sponge kite doll ball puppet puzzle letter envelope notebook newspaper calendar postcard
painting photograph poster ladder net hammock saddle bridle whip collar cage quilt cradle purse wallet handkerchief
bonnet veil fan parasol pipe razor violin guitar banjo magnet thermometer microscope lens canoe oar paddle sail flag
banner tapestry satchel suitcase bottle flask""".split()
FRUITS = """plum pear apple peach lemon orange cherry grape fig melon apricot quince banana strawberry raspberry
blackberry gooseberry walnut chestnut acorn hazelnut almond onion carrot turnip radish potato tomato cucumber pumpkin
cabbage leek parsnip mushroom olive pineapple coconut mulberry cranberry pomegranate""".split()
UNITS = """coin nail egg stamp biscuit bun shell bead ticket brick pin card seed pebble feather peg log plank stick
tile guinea shilling cracker crayon muffin""".split()
TRADES = """baker miller smith carpenter weaver tailor butcher grocer farmer shepherd sailor fisherman hunter gardener
cook teacher doctor lawyer judge priest painter poet singer actor printer bookseller clerk banker merchant soldier
captain pilot porter coachman groom saddler potter mason barber brewer cooper tanner dyer glazier plumber clockmaker
jeweller carter innkeeper engineer""".split()

# First words and nouns: these are held out as combinations.
LOOKS = """brass red iron old silver blue golden small copper green tin black bronze heavy wooden white steel tiny
stone yellow clay grey ivory large oak brown marble new pine purple polished scarlet painted rusty carved crimson
striped plain spotted round broken square gilded long tarnished short costly cheap""".split()
OBJECTS = """key spoon kettle bell lamp ring cup plate bowl jug pot pan knife fork tray vase goblet ladle thimble
buckle button whistle trumpet horn flute drum fiddle compass sundial telescope lantern candlestick inkstand anchor
hammer chisel saw axe spade rake hoe sickle hook chain padlock hinge wheel handle lever pulley sword dagger shield
helmet spear arrow medal crown bracelet necklace brooch locket watch hourglass globe teapot saucer pitcher tankard
funnel sieve doorknob trowel gong harp lyre bugle""".split()
PLACE_LOOKS = """tall old narrow green wide dusty low white dark broken painted small large plain crooked grey wooden
great secret cracked red shabby second quiet third little last""".split()
PLACES = {
    "in": """cupboard chest drawer box basket barrel trunk cellar attic kitchen pantry barn stable shed garden orchard
    church chapel library parlour study nursery hall cottage mill bakery workshop cave bucket jar sack crate cart wagon
    boat cabin tent closet hut loft greenhouse dairy forge school inn cabinet courtyard""",
    "on": "shelf table bench desk mantelpiece counter roof balcony windowsill ledge stool pier terrace porch",
    "under": "bed sofa carpet rug pillow mattress staircase hedge tree bush floor chair cushion haystack bridge",
    "behind": "curtain door wall clock fence gate bookcase picture stove screen chimney waterfall wardrobe piano",
    "beside": "fountain pond stream path statue furnace anvil trough pump gatepost milestone beehive signpost",
}
COATS = """grey young white old black tame brown wild spotted clever striped lazy shaggy proud fat shy thin noisy small
gentle large hungry lame sleepy""".split()
ANIMALS = """horse pony donkey mule cow ox bull calf sheep lamb goat pig hen rooster duck goose turkey swan pigeon
parrot raven crow magpie jackdaw owl hawk falcon peacock canary finch sparrow dog puppy hound terrier spaniel cat
kitten rabbit hare ferret squirrel hedgehog badger fox otter tortoise lizard frog toad snake monkey camel elephant bear
wolf mouse rat dormouse heron stork""".split()
SIDES = """north upper south lower east inner west outer front first back second old third new great hidden little main
middle""".split()
DOORS = "gate door safe vault tower chamber passage stairway treasury armoury library cellar strongroom".split()
FLAVOURS = """ginger mutton honey beef barley chicken cheese trout treacle salmon cinnamon oyster nutmeg eel rice
lobster pea lentil mint parsley pepper mustard vanilla raisin rhubarb oatmeal caramel celery""".split()
DISHES = "soup pie stew cake pudding broth porridge pasty tart salad custard dumpling omelette jelly".split()
TOWN_FIRSTS = """Upper Lower Great Little North South East West Old New Long High Nether Market Castle Abbey Kings
Monks Stony Bishops""".split()
TOWNS = """Ashby Barton Burton Compton Dalton Farley Hampton Kirby Langley Marston Milton Newton Norton Oakley Preston
Radley Selby Stanton Sutton Thornton Walton Weston Whitby Winslow Hadley Henley Bradford Haddon Melford Wakefield
Fairfield Greenfield Redhill Ashford Bradley Bexley Crosby Hartley Morley Ripley""".split()

DEEDS = {  # kind -> its verbs as (plain form, past); no verb serves two kinds
    "count": (("pick", "picked"), ("wash", "washed"), ("drop", "dropped"), ("peel", "peeled"), ("taste", "tasted")),
    "collect": (("break", "broke"), ("find", "found"), ("lose", "lost"), ("mend", "mended"), ("borrow", "borrowed")),
    "sum": (("lend", "lent"), ("send", "sent"), ("bring", "brought"), ("sell", "sold"), ("hand", "handed")),
}
KEYS = {  # kind -> the slots that say what a task is about
    "where": ("thing",),
    "code": ("door",),
    "owner": ("animal",),
    "dish": ("who",),
    "home": ("who",),
    "trade": ("who",),
    "gift": ("who", "whom"),
    "count": ("deed", "fruit"),
    "collect": ("who", "deed"),
    "sum": ("who", "whom", "deed", "unit"),
}
KINDS = tuple(KEYS)
WEIGHTS = {"count": 0.5}  # of a kind among the questions; 1 for the others
ANY_ORDER = ("count", "collect", "sum")  # right in any order: "a hat and a map", "3 and 4, in all 7"
# In training only, so that copying and the question's sense are learnt, and not the pools and the wordings:
BORROWED = 0.8  # share of words taken from the prose instead
FIRST_BORROWED = 0.5  # the same of the first words of a pair
COINED = 0.25  # share of the words taken from the prose to which the end of another is added: "gardenher"
WORN = 0.15  # share of statements with one of their own words, names aside, taken from the prose instead
OPENED = 0.25  # share of statements and questions that begin with one of these
STATEMENT_OPENERS = ("They say that", "Everyone knows that", "It is said that", "I have heard that", "You know that")
QUESTION_OPENERS = ("Now,", "So", "And", "But", "Well,", "Then", "Tell me,", "Say,", "Do you know:", "Oh,")

# ---- wordings, told and asked. Every fifth of a kind is held out, as words are. ----

TIMES = (  # for the deeds; many, so that the facts of one count all read differently
    "{}.", "Then {}.", "After a while {}.", "{} in the morning.", "{} after a while.",
    "In the evening {}.", "{} before dinner.", "After breakfast {}.", "{} at noon.", "In the morning {}.",
    "One day {}.", "{} on Monday.", "On Friday {}.", "{} that afternoon.", "On Monday {}.",
    "Before sunset {}.", "{} late at night.", "Soon {}.", "{} after lunch.", "At noon {}.",
    "{} by chance.", "Later on {}.", "{} without a word.", "Once {}.", "{} before sunset.",
)


def capitalised(wording: str) -> str:
    return wording[0].upper() + wording[1:]


STATEMENTS = {  # what the question asks for comes last, after what it is about: so a reader can find one by the other
    "where": (
        "{who} keeps the {thing} {value}.", "{who} has put the {thing} {value}.", "{who} left the {thing} {value}.",
        "{who} hid the {thing} {value}.", "{who} has left the {thing} {value}.",
        "The {thing} of {who} is {value}.", "{who}'s {thing} is {value}.", "{who} always puts the {thing} {value}.",
        "{who} has hidden the {thing} {value}.", "{who} always keeps the {thing} {value}.",
    ),
    "code": (
        "The code of the {door} is {value}.", "The {door} opens with the code {value}.",
        "The code for the {door} is {value}.", "One opens the {door} with the code {value}.",
        "The {door} has the code {value}.", "The {door} has the number {value}.",
        "The number of the {door} is {value}.", "For the {door} the code is {value}.",
        "The {door} needs the code {value}.",
        "For the {door} one needs the code {value}.",
        "The lock of the {door} has the code {value}.", "The right code for the {door} is {value}.",
        "To open the {door}, use the code {value}.", "The code to the {door} is {value}.",
        "The right code of the {door} is {value}.",
        "The secret code of the {door} is {value}.", "The number for the {door} is {value}.",
        "To open the {door} one needs the number {value}.", "The lock of the {door} opens with the number {value}.",
        "The {door} opens with the number {value}.",
    ),
    "owner": (
        "The {animal} belongs to {value}.", "The owner of the {animal} is {value}.",
        "The {animal} is owned by {value}.", "The {animal} was bought by {value}.",
        "The {animal} is now owned by {value}.", "The {animal} now belongs to {value}.",
        "The {animal} has been sold to {value}.", "The new owner of the {animal} is {value}.",
        "The {animal} is kept by {value}.", "The {animal} has been bought by {value}.",
        "The {animal} was sold to {value}.", "The {animal} was given to {value}.",
        "The {animal} is the property of {value}.", "The {animal} has always belonged to {value}.",
        "The {animal} has been given to {value}.",
        "The keeper of the {animal} is {value}.", "The one who owns the {animal} is {value}.",
        "The {animal} lives with {value}.", "The {animal} was left to {value}.",
        "The {animal} is now the property of {value}.",
    ),
    "dish": (
        "The favourite dish of {who} is {value}.", "{who}'s favourite dish is {value}.",
        "The dish that {who} likes best is {value}.", "Best of all {who} likes {value}.",
        "What {who} likes best is {value}.", "What {who} likes to eat is {value}.", "{who} is very fond of {value}.",
        "{who} loves {value}.", "The dish that {who} loves is {value}.", "What {who} loves best is {value}.",
        "{who} likes nothing better than {value}.", "{who} would always choose {value}.",
        "{who} always asks for {value}.", "{who} dreams of {value}.", "Best of all {who} loves {value}.",
        "The best dish for {who} is {value}.", "{who} cannot resist {value}.", "Every week {who} eats {value}.",
        "For dinner {who} likes {value}.", "For dinner {who} always asks for {value}.",
        "What {who} loves most is {value}.", "What {who} likes most of all is {value}.",
        "{who} loves best of all {value}.", "The dish that {who} loves best is {value}.",
        "{who} likes most of all {value}.",
        "What {who} always asks for is {value}.", "{who} is fond above all of {value}.",
        "What {who} would choose is {value}.", "Nothing pleases {who} more than {value}.",
        "The dish that {who} would choose is {value}.",
    ),
    "home": (
        "{who} lives {value}.", "{who} has a house {value}.", "The house of {who} is {value}.",
        "{who}'s home is {value}.", "The home of {who} is {value}.", "{who} has lived for years {value}.",
        "{who}'s house is {value}.", "{who} was born {value}.", "The family of {who} lives {value}.",
        "{who} has a home {value}.",
        "{who} has moved to a house {value}.", "{who} has settled {value}.", "One can find {who} {value}.",
        "{who} was always at home {value}.", "{who} has settled for good {value}.",
        "{who} took a house {value}.", "{who} has rooms {value}.", "{who} grew up {value}.",
        "The parents of {who} live {value}.", "{who} has taken a house {value}.",
    ),
    "trade": (
        "By trade {who} is {value}.", "{who} works as {value}.", "{who} is well known as {value}.",
        "{who} earns a living as {value}.", "{who} has work as {value}.", "{who} has become {value}.",
        "{who} is {value}.", "{who} has got work as {value}.", "{who} has worked for years as {value}.",
        "{who} is at work as {value}.",
        "{who} has a place as {value}.", "{who} makes a living as {value}.",
        "By trade {who} has always been {value}.", "{who} was trained as {value}.",
        "{who} has earned a living as {value}.",
        "{who} got a place as {value}.", "{who} went to work as {value}.", "For years {who} has been {value}.",
        "{who} is at present {value}.", "{who} has gone to work as {value}.",
    ),
    "gift": (
        "{who} gave {whom} {value}.", "{who} made {whom} a present of {value}.", "Once {who} gave {whom} {value}.",
        "As a present, {who} gave {whom} {value}.", "As a gift, {who} gave {whom} {value}.",
        "{who} made {whom} a gift of {value}.", "From {who} there came to {whom} {value}.",
        "As a surprise, {who} gave {whom} {value}.", "In secret {who} gave {whom} {value}.",
        "In the end {who} gave {whom} {value}.",
        "For a birthday {who} gave {whom} {value}.", "{who} presented {whom} with {value}.",
        "The present of {who} to {whom} was {value}.", "Without a word {who} gave {whom} {value}.",
        "The gift of {who} to {whom} was {value}.",
        "One evening {who} gave {whom} {value}.", "The gift that {who} gave {whom} was {value}.",
        "With a smile {who} gave {whom} {value}.", "{who} surprised {whom} with {value}.",
        "The present that {who} gave {whom} was {value}.",
        "As a small present, {who} gave {whom} {value}.", "At the end of the day {who} gave {whom} {value}.",
        "With many kisses {who} gave {whom} {value}.", "On a birthday {who} gave {whom} {value}.",
        "In the end {who} made {whom} a present of {value}.",
        "In front of everyone {who} gave {whom} {value}.", "As a joke, {who} gave {whom} {value}.",
        "In great haste {who} gave {whom} {value}.", "{whom} was given by {who} {value}.",
        "With a smile {who} made {whom} a gift of {value}.",
    ),
    "count": tuple(capitalised(time.format("the {fruits} were {did} by {value}")) for time in TIMES),
    "collect": tuple(time.format("{who} {did} {value}") for time in TIMES),
    "sum": tuple(time.format("{who} {did} {whom} {value} {units}") for time in TIMES),
}
ANSWERS = {  # one wording a kind: an answer says again what it is about, all of it before the value
    "where": "The {thing} is {value}.",
    "code": "The code of the {door} is {value}.",
    "owner": "The {animal} belongs to {value}.",
    "dish": "The favourite dish of {who} is {value}.",
    "home": "{who} lives {value}.",
    "trade": "{who} works as {value}.",
    "gift": "{who} gave {whom} {value}.",
    "count": "The {fruits} were {did} by {value}.",  # who they were comes first: "Ann and Bob, in all two"
    "collect": "{who} {did} {value}.",
    "sum": "Of {units} {who} {did} {whom} {value}.",  # the value shows its parts: "3 and 4, in all 7"
}
QUESTIONS = {
    "where": (
        "Where does {who} keep the {thing}?", "Where is {who}'s {thing}?", "Where can {who} find the {thing}?",
        "Where did {who} leave the {thing}?", "Where does {who} find the {thing}?",
        "Where is the {thing} of {who}?", "Where did {who} put the {thing}?", "Where did {who} hide the {thing}?",
        "Where has {who} left the {thing}?", "Where has {who} put the {thing}?",
    ),
    "code": (
        "What is the code of the {door}?", "Which code opens the {door}?", "With which code does the {door} open?",
        "Which number is the code of the {door}?", "Which is the code of the {door}?",
        "What is the number of the {door}?", "Which number opens the {door}?", "Which code does the {door} have?",
        "What code does the {door} need?", "What number does the {door} have?",
        "What is the code for the {door}?", "What number opens the {door}?", "Which code does the {door} need?",
        "With which number does the {door} open?", "Which number does the {door} need?",
        "What is the code to the {door}?", "Which code is the right one for the {door}?",
        "What number does one need for the {door}?", "How does one open the {door}?",
        "What code does one need for the {door}?",
    ),
    "owner": (
        "Who owns the {animal}?", "Whose is the {animal}?", "To whom does the {animal} belong?",
        "Who is the owner of the {animal}?", "Who does the {animal} belong to?", "Who has the {animal}?",
        "Who bought the {animal}?", "Who is it that owns the {animal}?", "By whom is the {animal} owned?",
        "Who is it that has the {animal}?",
        "Who is the keeper of the {animal}?", "To whom was the {animal} sold?", "Whose animal is the {animal}?",
        "Who is the master of the {animal}?", "By whom was the {animal} bought?",
        "Whose property is the {animal}?", "Who keeps the {animal}?", "With whom does the {animal} live?",
        "Who was given the {animal}?", "To whom was the {animal} given?",
    ),
    "dish": (
        "What is {who}'s favourite dish?", "Which dish does {who} like best?", "What is the favourite dish of {who}?",
        "What does {who} like to eat best of all?", "Which is the favourite dish of {who}?",
        "What does {who} love to eat?", "Of which dish is {who} fond?", "Which dish does {who} love?",
        "What is it that {who} likes best?", "Which dish is it that {who} likes best?",
        "What would {who} always choose to eat?", "What does {who} like best?", "What does {who} always ask for?",
        "What is the best dish for {who}?", "Which dish does {who} always ask for?",
        "What dish does {who} like best?", "What does {who} dream of eating?", "Which dish can {who} not resist?",
        "What does {who} like for dinner?", "What dish does {who} love?",
    ),
    "home": (
        "Where does {who} live?", "Where is {who}'s home?", "In which village does {who} live?",
        "Where is the house of {who}?", "Where is the home of {who}?", "Where does the family of {who} live?",
        "Where is {who}'s house?", "Where has {who} a house?", "In which place does {who} live?",
        "In which place is {who}'s home?",
        "In which town does {who} live?", "Where did {who} settle?", "Where has {who} settled?",
        "In which town is {who}'s house?", "In which town is the house of {who}?",
        "Where can one find {who}?", "In which village is the house of {who}?", "Where is {who} at home?",
        "Where did {who} grow up?", "In which village is {who}'s home?",
    ),
    "trade": (
        "What is {who} by trade?", "As what does {who} work?", "What does {who} work as?",
        "As what does {who} earn a living?", "What does {who} earn a living as?", "What work does {who} do?",
        "What is the trade of {who}?", "What is {who}'s trade?", "Which trade has {who}?",
        "Which is the trade of {who}?",
        "How does {who} earn a living?", "How does {who} make a living?", "What does {who} do for a living?",
        "Which trade does {who} follow?", "What trade does {who} follow?",
        "What is the work of {who}?", "Which is the work of {who}?", "As what was {who} trained?",
        "What has {who} become?", "What is {who}'s work?",
    ),
    "gift": (  # the giver comes first, as in the answer: to tell the roles apart is not what is asked here
        "What did {who} give {whom}?", "What did {who} give to {whom}?", "What was the present of {who} to {whom}?",
        "Which present did {who} give {whom}?", "What present did {who} give {whom}?",
        "What was the gift of {who} to {whom}?", "What was it that {who} gave {whom}?",
        "Which gift did {who} give {whom}?", "From {who}, what did {whom} get?", "From {who}, which gift had {whom}?",
        "Which gift did {who} give to {whom}?", "What present did {who} give to {whom}?",
        "With what did {who} present {whom}?", "What was {who}'s present to {whom}?",
        "Which present did {who} give to {whom}?",
        "With what did {who} surprise {whom}?", "What was {who}'s gift to {whom}?", "From {who}, what had {whom}?",
        "What was it that {who} gave to {whom}?", "What gift did {who} give {whom}?",
    ),
    "count": (
        "How many people {did} {fruits}?", "By how many people were {fruits} {did}?", "How many {did} {fruits}?",
        "How many were those who {did} {fruits}?", "In all, how many people {did} {fruits}?",
        "How many people were there who {did} {fruits}?", "By how many were {fruits} {did}?",
        "How many people {did} {fruits} in all?", "By how many people in all were {fruits} {did}?",
        "How many people altogether {did} {fruits}?",
    ),
    "collect": (
        "What did {who} {do}?", "Which things did {who} {do}?", "What did {who} {do} in all?",
        "What were the things that {who} {did}?", "Which were the things that {who} {did}?",
        "What things did {who} {do}?", "What was it that {who} {did}?", "Which things were those that {who} {did}?",
        "What did {who} {do} altogether?", "What things were those that {who} {did}?",
    ),
    "sum": (
        "How many {units} did {who} {do} {whom}?", "What number of {units} did {who} {do} {whom}?",
        "How many {units} did {who} {do} {whom} in all?", "How many were the {units} that {who} {did} {whom}?",
        "In all, how many {units} did {who} {do} {whom}?",
        "How many {units} were those that {who} {did} {whom}?", "In all, what number of {units} did {who} {do} {whom}?",
        "How many {units} did {who} {do} {whom} altogether?",
        "Altogether, what number of {units} did {who} {do} {whom}?",
        "Altogether, how many {units} did {who} {do} {whom}?",
    ),
}


def held_out(*places: int) -> bool:
    """The rule of the split. A word alone is held out at every fifth place of its pool; words together if their places
    sum to such a number, or if one of them is the last of twenty. The digits of a code count as places."""
    return sum(places) % 5 == 4 or (len(places) > 1 and any(place % 20 == 19 for place in places))


def words(pool: list[str] | tuple[str, ...], split: str) -> tuple[str, ...]:
    return tuple(word for i, word in enumerate(pool) if held_out(i) == (split == "test"))


def pairs(firsts: list[str], nouns: list[str], split: str) -> tuple[tuple[str, ...], ...]:
    """Combinations, one row per noun: ("brass key", "old key", ...). A noun is a pattern, its {} the first word."""
    rows = [
        tuple(noun.format(first) for i, first in enumerate(firsts) if held_out(i, j) == (split == "test"))
        for j, noun in enumerate(nouns)
    ]
    return tuple(row for row in rows if row)  # a held-out noun has no combination in training


def worn(rng: random.Random, wording: str, words: Sequence[str]) -> str:
    """The wording with one of its words changed for one of `words`, once in a while."""
    own = [i for i, word in enumerate(wording.split()) if word.isalpha()]
    if not words or not own or rng.random() >= WORN:
        return wording
    changed = wording.split()
    changed[rng.choice(own)] = rng.choice(words)
    return " ".join(changed)


def opened(rng: random.Random, wording: str, openers: tuple[str, ...]) -> str:
    """The wording, after one of the openers once in a while."""
    if not openers or rng.random() >= OPENED:
        return wording
    return f"{rng.choice(openers)} {wording[0].lower()}{wording[1:]}"  # "{who}", a name to come, has no lower case


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def plural(noun: str) -> str:
    if noun.endswith("y"):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("ch", "sh", "to", "go")) else "s")


def unseen_words() -> frozenset[str]:
    """Every word, and plural, that is held out as a whole."""
    single = {word for pool in (PEOPLE, GOODS, FRUITS, UNITS, TRADES) for word in words(pool, "test")}
    return frozenset(single | {plural(word) for word in single})


class Vocabulary:
    """What the documents of one split may say: rows of every pool, and the wordings of every kind."""

    def __init__(self, split: str):
        self.split = split
        patterns = {
            "thing": (LOOKS, ["{} " + noun for noun in OBJECTS]),
            "place": (PLACE_LOOKS, [f"{at} the {{}} {noun}" for at, nouns in PLACES.items() for noun in nouns.split()]),
            "animal": (COATS, ["{} " + noun for noun in ANIMALS]),
            "door": (SIDES, ["{} " + noun for noun in DOORS]),
            "dish": (FLAVOURS, ["{} " + noun for noun in DISHES]),
            "town": (TOWN_FIRSTS, ["in {} " + noun for noun in TOWNS]),
        }
        self.pools = {name: pairs(firsts, nouns, split) for name, (firsts, nouns) in patterns.items()}
        for name, pool in (("who", PEOPLE), ("good", GOODS), ("fruit", FRUITS), ("unit", UNITS), ("trade", TRADES)):
            self.pools[name] = tuple((word,) for word in words(pool, split))
        self.statements = {kind: words(wordings, split) for kind, wordings in STATEMENTS.items()}
        self.questions = {kind: words(wordings, split) for kind, wordings in QUESTIONS.items()}
        self.unseen = unseen_words()
        self.statement_openers = STATEMENT_OPENERS if split == "train" else ()
        self.question_openers = QUESTION_OPENERS if split == "train" else ()

    def scene(
        self, rng: random.Random, people: int, goods: int, nouns: int, looks: int, lexicon: Sequence[Sequence[str]]
    ) -> dict[str, list[str]]:  # fmt: skip
        """The few words that one document is about: so many people, goods, and nouns with `looks` first words each.

        lexicon: words and capitalised words of the prose. In training they take the place of most words: of single
        ones, of the last one of a pair ("brass yesterday"), and of some first ones ("never yesterday"). Some go on with
        the end of another: who has read a known word must see whether it ends there ("Joseph", "Josephine").
        """
        sizes = {"who": people, "good": goods}
        made, used = {}, set(self.unseen)

        def borrow(share: float, instead_of: str) -> str:
            """A word of the prose, or the one there is; no word for two things in one scene."""
            source = lexicon[instead_of[0].isupper()]
            if self.split == "train" and source and rng.random() < share:
                word = rng.choice(source)
                if rng.random() < COINED:
                    tail = rng.choice(source).lower()
                    word += tail[len(tail) // 2 :]
                if word not in used:
                    used.add(word)
                    return word
            return instead_of

        for name, rows in self.pools.items():
            chosen = [list(rng.sample(row, min(looks, len(row)))) for row in rng.sample(rows, sizes.get(name, nouns))]
            for row in chosen:
                last = row[0].split()[-1]
                noun = borrow(BORROWED, last)
                row[:] = [phrase.removesuffix(last) + noun for phrase in row]
                if " " in row[0]:
                    for i, phrase in enumerate(row):
                        *start, first, noun = phrase.split()
                        row[i] = " ".join([*start, borrow(FIRST_BORROWED, first), noun])
            made[name] = [word for row in chosen for word in row]
        return made


VOCABULARIES = {split: Vocabulary(split) for split in ("train", "test")}
