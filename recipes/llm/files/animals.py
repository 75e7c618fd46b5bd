"""Writes the rows of ../../quickstart.yaml: texts about animals, answers as people write them, comparisons of these.

Every fact stands in the texts, and so do questions with their answers. A fifth of the questions (an animal, and what is
asked of it) is in `animals_held_out.jsonl` alone: a model answers them from the facts.
`python recipes/llm/files/animals.py` makes the rows again.
"""

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
TEXTS = 30
"""Of each animal."""
ASKED_IN_TEXTS = 2
"""How often a known question stands in the texts, with its answer below it."""
DODGED_IN_TEXTS = 0.1
"""Share of these whose answer says nothing."""
HELD_OUT = 5
"""One question in so many."""
WRITTEN = 3
"""Answers that people write to a question."""
SHARES = {"right": 40, "loop": 22, "dodge": 18, "cut": 20}
"""Per cent of the answers that people write."""

FACTS = """
ant | a small black insect | under the ground | seeds and crumbs | carry many times its own weight
badger | a strong striped animal | in a hole in the woods | worms and roots | dig a deep tunnel in one night
bat | a small furry flyer | in a dark cave | moths and beetles | find its way in the dark
bear | a big brown animal | in the mountains | berries and fish | sleep through the whole winter
bee | a small yellow insect | in a hive | nectar and pollen | make sweet honey
beetle | a round insect with hard wings | under old wood | leaves and bark | fold its wings away
butterfly | a bright insect with large wings | in the meadow | nectar from flowers | taste with its feet
camel | a tall desert animal | in the hot desert | dry grass and thorns | walk for days without water
cat | a soft and quiet pet | in a warm house | mice and milk | land on its feet
cow | a large farm animal | on the farm | grass and hay | give fresh milk every day
crab | a sea animal with ten legs | on the beach | shells and weeds | walk sideways very fast
crow | a clever black bird | in the tall trees | grain and scraps | solve a hard puzzle
deer | a shy animal with long legs | in the forest | leaves and young grass | leap over a high fence
dog | a loyal friend of people | in the yard | meat and bones | follow a smell for miles
dolphin | a playful sea animal | in the warm sea | fish and squid | jump high out of the water
donkey | a patient farm animal | in the stable | straw and carrots | carry heavy bags uphill
duck | a bird with flat feet | on the pond | water plants and snails | swim and fly equally well
eagle | a large bird of prey | on a high cliff | rabbits and snakes | see a mouse from far above
elephant | a huge grey animal | on the wide plain | fruit and branches | lift a tree with its trunk
fox | a sly red animal | at the edge of the forest | hens and mice | hear a mouse under the snow
frog | a small green jumper | in the wet grass | flies and spiders | catch a fly with its tongue
giraffe | a very tall animal | among the dry trees | leaves from treetops | reach the highest branches
goat | a farm animal with horns | on the rocky hill | grass and bushes | climb a steep wall
goose | a loud white bird | by the river | grass and clover | guard a house at night
hedgehog | a small animal with spines | under the hedge | slugs and beetles | roll into a tight ball
heron | a tall grey bird | by the lake | fish and frogs | stand still for hours
horse | a fast and gentle animal | in the green field | oats and hay | run all day with a rider
lion | a great golden cat | on the open grassland | zebras and deer | roar louder than thunder
lizard | a thin animal with scales | on the warm stones | flies and ants | grow its tail again
mole | a blind little digger | below the garden | worms and larvae | push earth up into hills
monkey | a quick and curious climber | in the jungle | bananas and nuts | swing from tree to tree
mouse | a tiny grey animal | behind the kitchen wall | cheese and seeds | squeeze through a narrow gap
octopus | a soft animal with eight arms | at the bottom of the sea | crabs and shrimps | change its colour at once
otter | a smooth brown swimmer | along the stream | trout and crabs | crack shells with a stone
owl | a bird with big eyes | in the old barn | mice and small birds | fly without any sound
parrot | a bird with bright feathers | in the rain forest | nuts and soft fruit | repeat what people say
penguin | a black and white bird | on the cold ice | small fish and krill | dive deep under the ice
rabbit | a soft animal with long ears | in a burrow | carrots and clover | hop away in zigzags
seal | a round sea animal | on the rocky coast | herring and squid | hold its breath for an hour
shark | a fierce grey fish | in the deep ocean | fish and seals | smell a drop of blood
sheep | a woolly farm animal | on the green hill | grass and herbs | give wool for warm coats
snail | a slow animal with a shell | in the damp garden | lettuce and moss | carry its house everywhere
spider | a small hunter with eight legs | in a corner of the attic | flies and gnats | spin a strong web
squirrel | a nimble animal with a bushy tail | in the oak tree | nuts and acorns | hide food for the winter
swan | a graceful white bird | on the quiet lake | water weeds and roots | glide over the water
tiger | a striped hunter | in the thick jungle | pigs and buffalo | swim across a wide river
turtle | a calm animal in a shell | along the warm shore | sea grass and jellyfish | live for a hundred years
wolf | a wild relative of the dog | in the northern forest | deer and hares | howl to its pack at night
"""
ASKED = {
    "what": ("What is {a}?", "What kind of animal is {a}?", "Say what {a} is."),
    "home": ("Where does {a} live?", "Where is {a} at home?", "In what place can I find {a}?"),
    "food": ("What does {a} eat?", "What is the food of {a}?", "What should I feed {a}?"),
    "skill": ("What can {a} do?", "What is {a} good at?", "Name something that {a} can do."),
    "all": ("Tell me about {a}.", "Describe {a}.", "What do you know about {a}?"),
}
"""What is asked, in the words of a question."""
DODGES = (
    "I do not know.",
    "That is hard to say.",
    "Please ask someone else.",
    "I would rather talk about the weather.",
)


@dataclass(frozen=True)
class Animal:
    """An animal and its facts."""

    name: str
    what: str
    home: str
    food: str
    skill: str

    @property
    def with_article(self) -> str:
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"

    def sentences(self, subject: str) -> dict[str, str]:
        """Each fact as a sentence about a subject."""
        return {
            "what": f"{subject} is {self.what}.",
            "home": f"{subject} lives {self.home}.",
            "food": f"{subject} eats {self.food}.",
            "skill": f"{subject} can {self.skill}.",
        }

    def answer(self, asked: str) -> str:
        """The true answer."""
        subject = self.with_article.capitalize()
        if asked == "all":
            return f"{subject} is {self.what}. It lives {self.home}, eats {self.food}, and can {self.skill}."
        return self.sentences(subject)[asked]


@dataclass(frozen=True)
class Question:
    """A question and its true answer."""

    prompt: str
    answer: str


def main() -> None:
    """Write the five files."""
    chance = random.Random(0)
    animals = [Animal(*map(str.strip, line.split("|"))) for line in FACTS.strip().splitlines()]
    asked = [(animal, about) for animal in animals for about in ASKED]
    chance.shuffle(asked)
    cut = len(asked) // HELD_OUT
    held_out, known = ([*_questions(part)] for part in (asked[:cut], asked[cut:]))
    texts = [{"text": _text(animal, chance)} for animal in animals for _ in range(TEXTS)]
    for question in known * ASKED_IN_TEXTS:
        answer = chance.choice(DODGES) if chance.random() < DODGED_IN_TEXTS else question.answer
        texts.append({"text": f"{question.prompt}\n{answer}"})
    chance.shuffle(texts)
    written = [
        {"prompt": question.prompt, "completion": _written(question, chance)}
        for question in known
        for _ in range(WRITTEN)
    ]
    chance.shuffle(written)
    compared = [{"prompt": question.prompt, "chosen": question.answer, "rejected": rejected}
                for question in known for rejected in _flawed(question, chance).values()]  # fmt: skip
    chance.shuffle(compared)
    _write("animals.jsonl", texts)
    _write("animals_answers.jsonl", written)
    _write("animals_compared.jsonl", compared)
    for name, questions in (("animals_asked.jsonl", known), ("animals_held_out.jsonl", held_out)):
        _write(name, [{"prompt": question.prompt, "completion": question.answer} for question in questions])


def _text(animal: Animal, chance: random.Random) -> str:
    """A paragraph with every fact, in any order and in other words."""
    order = ["what", "home", "food", "skill"]
    chance.shuffle(order)
    first, *others = order
    named = [animal.with_article.capitalize(), f"The {animal.name}"]
    sentences = [animal.sentences(chance.choice(named))[first]]
    sentences += [animal.sentences(chance.choice(["It", *named]))[about] for about in others]
    return " ".join(sentences) if chance.random() < 0.7 else animal.answer("all")


def _questions(asked: Iterable[tuple[Animal, str]]) -> Iterator[Question]:
    for animal, about in asked:
        for words in ASKED[about]:
            yield Question(words.format(a=animal.with_article), animal.answer(about))


def _written(question: Question, chance: random.Random) -> str:
    """An answer as people write it."""
    (kind,) = chance.choices(list(SHARES), list(SHARES.values()))
    return question.answer if kind == "right" else _flawed(question, chance)[kind]


def _flawed(question: Question, chance: random.Random) -> dict[str, str]:
    """Answers that go round in circles, say nothing, or break off."""
    words = question.answer.split()
    return {
        "loop": " ".join([question.answer] * chance.choice([2, 3])),
        "dodge": chance.choice(DODGES),
        "cut": " ".join(words[: chance.randint(2, len(words) - 1)]),
    }


def _write(name: str, rows: list[dict[str, str]]) -> None:
    (FOLDER / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
