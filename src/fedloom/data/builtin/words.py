"""The closed word lists of the built-in tasks and of the text their base model was pretrained on."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Tom Ann Ben Eve Sam Mia Leo Zoe Max Ida Jim Amy Dan Kim Roy Liz "
    "Ted Pam Ron Sue Joe Meg Ned Una Bob Eva Gus Ivy Ken Lou Nan Vic"
)
CITIES = _words(
    "Paris Rome Oslo Lima Cairo Delhi Tokyo Seoul Quito Bern Dublin Riga "
    "Porto Lagos Perth Accra Berlin Madrid Kyoto Turin Hanoi Boston Miami Prague"
)
JOBS = _words("teacher baker farmer doctor driver singer painter nurse cook pilot tailor lawyer")
THINGS = _words("apples pears coins books pens cards balls stamps shells cups hats keys eggs nuts toys stones")

CLASSES: dict[str, tuple[str, ...]] = {
    "animal": _words(
        "dog cat horse cow pig duck sheep goat mouse bear wolf fox frog fish lion tiger "
        "zebra camel deer moose rabbit hare otter seal whale shark eagle hawk owl crow dove swan "
        "goose hen rooster donkey mule monkey ape snake lizard turtle toad crab ant bee spider parrot"
    ),
    "food": _words(
        "bread cheese rice soup cake apple pear plum honey butter corn bean salad pie noodle potato "
        "tomato onion carrot cabbage lettuce pepper garlic lemon lime peach cherry grape melon mango banana fig "
        "date nut yogurt cream milk egg sausage ham bacon steak stew pasta pizza waffle cookie pudding"
    ),
    "colour": _words(
        "red blue green yellow brown pink black white gray purple gold silver crimson scarlet maroon magenta "
        "violet indigo navy teal turquoise cyan azure aqua emerald olive khaki tan beige ivory ebony amber "
        "ochre coral ruby lavender lilac mauve copper bronze rust charcoal jade cobalt sapphire fuchsia sepia "
        "umber"
    ),
    "tool": _words(
        "hammer saw drill spade rake axe knife brush ladder shovel wrench file pliers chisel screwdriver clamp "
        "vise mallet crowbar trowel hoe sickle scythe pickaxe hatchet shears scissors tweezers needle thimble awl "
        "lathe anvil tongs bellows level ruler compass plane sander grinder stapler broom mop bucket sponge "
        "wheelbarrow jack"
    ),
}
ITEMS = tuple(word for words in CLASSES.values() for word in words)

GAIN_VERBS = ("buys", "finds", "gets", "wins", "picks", "earns", "collects", "receives")
LOSS_VERBS = ("loses", "sells", "breaks", "drops", "eats", "spends", "throws away", "gives away")

VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnprstvwz"
ALPHABET = "abcdefghijklmnopqrstuvwxyz"

# English words of up to five letters that stand in instructions or in pretraining text. A made-up word or a letter
# string of a task must not be one of them: the tokenizer would hand it over whole and its letters would be hidden.
ENGLISH = frozenset(
    _words(
        "a above add adds after again alder all also an and any are around as ask at away back bag bags be been "
        "best big birch both but buys by can cap caps case cedar city code coins comes copy count cups cut cuts "
        "data day did do does dot down each eats eggs else end ends even ever every few fewer final find first fit "
        "five flip floor fn for form found four from get gets give gives go goes good got group had has hats have "
        "he her here him his how if in into is it item items its job just keep keys kind know last later left less "
        "let like likes lines list lists lives long look looks loses lower made make makes man many maple mark max "
        "maximum me mean means meet min minus more most move moved much mul must name named need neg new next nine "
        "no nor not now number nuts of off on once one only or order other our out over own pair paper part pens "
        "pick place plus put puts raise read row run said same saw say says see sell sells she sign six size small "
        "so some sort spell sq start step steps sub sum ta take taken takes talk tell ten than that the them then "
        "there these they thing this three time times to told too took top town toys turn twice two under up upper "
        "us use used very was way we well were what when where which who whose why will wins with word words work "
        "works write yes yet you your zero"
    )
).union(ITEMS, JOBS, THINGS, CLASSES, (word.lower() for word in (*NAMES, *CITIES)))


def with_article(noun: str) -> str:
    """'axe' -> 'an axe', 'saw' -> 'a saw'."""
    return ("an " if noun[0] in VOWELS else "a ") + noun
