"""Generate the training text of the tiny model: stories and chats composed from the hand-written `facts.txt`.

Everything comes from one seeded generator, so the same seed gives the same text on every machine. Run this
file to read a few samples: `python tools/tiny_model/corpus.py`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

FACTS = Path(__file__).with_name("facts.txt")
BOS, EOS = "<|begin|>", "<|endoftext|>"

#: A document is a list of (text, trained) pieces; the loss is masked where `trained` is False.
Document = list[tuple[str, bool]]


@dataclass(frozen=True)
class Subject:
    """One thing the model knows about; `many` equals `one` for what is not counted (rain, the Moon)."""

    one: str
    many: str
    counted: bool
    facts: tuple[str, ...]
    kind: str
    kinds: str
    hero: bool

    @property
    def pronoun(self) -> str:
        """The word that stands for the subject in the second sentence of an answer."""
        return "They" if self.counted else "It"

    @property
    def be(self) -> str:
        """The form of "to be" that fits the plural name."""
        return "are" if self.counted else "is"

    def sentence(self, fact: str) -> str:
        """Return a fact as a full sentence, without the dot."""
        return f"{upper(self.many)} {fact}"


def upper(text: str) -> str:
    """Capitalise the first letter only (str.capitalize would lower the rest)."""
    return text[:1].upper() + text[1:]


def a(noun: str) -> str:
    """Put the indefinite article before a noun."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def load_subjects(path: Path = FACTS) -> list[Subject]:
    """Read `facts.txt`; its head explains the notation."""
    subjects, kind, kinds, hero = [], "", "", False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            kind, kinds, story = line[3:].split(" / ")
            hero = story == "hero"
        elif ":" in line and not line.startswith("#"):
            name, facts = line.split(": ", 1)
            counted = name.endswith("+") or "/" in name
            one, _, many = name.partition("/") if "/" in name else (name.rstrip("+"), "", "")
            many = many or (one + "s" if counted else one)
            subjects.append(Subject(one, many, counted, tuple(facts.split("; ")), kind, kinds, hero))
    return subjects


GIRLS = ("Mila", "Anna", "Lucy", "Emma", "Rosa", "Zoë", "Lily", "Nora", "Ida", "Maya")
BOYS = ("Tom", "Ben", "Max", "Leo", "Sam", "José", "Finn", "Oscar", "Paul", "Theo")
HELPERS = ("grandmother", "grandfather", "teacher", "mother", "father", "aunt", "uncle", "neighbor")
PLACES = (
    "near a quiet river", "at the edge of a forest", "in a small village", "on a green hill",
    "by the blue sea", "in an old house",
    "not far from a lake", "behind a high mountain", "next to a little café",
    "in a sunny valley",
)  # fmt: skip
FRIENDS = (
    "a small bird", "an old turtle", "a kind farmer", "a shy mouse", "a clever crow", "a young sailor",
    "a friendly dog", "a wise owl",
)  # fmt: skip
ADJECTIVES = ("little", "young", "kind", "brave", "curious", "clever", "shy", "happy")
FINDS = (
    "a golden key",
    "an old map",
    "a red ball",
    "a blue stone",
    "a tiny letter",
    "a silver bell",
    "a lost shoe",
)
WEATHER = ("It was a warm morning.", "It was raining softly.", "The sun was shining.", 
           "Snow lay on the ground.", "A cool wind was blowing.",
           "There was fog over the fields.")  # fmt: skip
HERO_OPENINGS = (
    "Once upon a time there was {who} named {n}. {She} lived {place}.",
    "{Who} named {n} lived {place}.",
    "Once there was {one} named {n}. {She} was very {adjective} and lived {place}.",
)
ASK_OPENINGS = (
    ("Once upon a time there was {who} named {n}. {She} lived {place}. {She} wanted to know everything about {many}."),
    '{n} was {who} who lived {place}. One day {she} asked, "What {be} {many}?"',
)
EPISODES = (
    ("One day {n} found {find} on the path. {She} looked at it for a long time. Then {she} put it in a safe place."),
    ("One morning {n} met {friend}. They talked about the weather and shared some bread. Soon they were good friends."),
    "{weather} {n} went for a long walk. {She} saw many new things and came home tired but happy.",
    ("Then a storm came. The wind was strong and the sky was dark. {n} stayed inside and waited until it was over."),
    "After that {n} came to a wide river. There was no bridge, but {friend} showed {her} a safe way across.",
    (
        "Suddenly {n} heard a strange sound. {She} was afraid, but {she} went to look. "
        "It was only {friend}, who was lost. {n} helped to find the way home."
    ),
    (
        "The next day {n} wanted to help. {She} carried water to the garden and worked until the evening. "
        'Everyone said, "Thank you, {n}!"'
    ),
    "Later {n} climbed a high hill. From the top {she} could see the whole valley and the sea far away.",
    (
        "{n} was hungry. {She} looked everywhere and at last found some sweet apples. "
        "{She} gave half of them to {friend}."
    ),
    ("One evening {n} lost the way. It grew dark and cold. Then {she} saw a small light, and it led {her} home."),
    "On the way {n} stopped to rest under an old tree. {She} closed {her_} eyes and listened to the birds.",
    ("At the market {n} saw {find}. Nobody knew where it came from. {n} asked everyone and found the owner at last."),
)
ENDINGS = (
    "That night {n} slept very well.",
    "{n} was happy, and so were all {her_} friends.",
    "In the end {n} came home and told the whole story.",
    "From that day on, {n} was never alone again.",
    "{n} smiled and looked up at the stars. 🌟",
    "And that was the best day of the year.",
)
KNOWS = (
    "{fact}. {n} knew this very well.",
    "As you know, {low}. This is important in our story.",
    'Once {friend} said to {n}, "{fact}." {n} laughed, because it was true.',
)
ASKS = (
    '"{fact}," said {her_} {helper}.',
    'In an old book {she} read, "{fact}."',
    'Then {friend} told {her} something new: "{fact}."',
    "After some time {n} learned that {low}.",
    '{She} asked {her_} {helper} again. "{fact}," was the answer.',
)


def low(subject: Subject, fact: str) -> str:
    """Return a fact as a clause for the middle of a sentence."""
    return f"{subject.many} {fact}"


def story(rng: random.Random, subject: Subject, size: int) -> str:
    """Tell a story with `size` events: 0 or 1 is short, 5 or 6 is long."""
    girl = rng.random() < 0.5
    words = {
        "n": rng.choice(GIRLS if girl else BOYS),
        "She": "She" if girl else "He",
        "she": "she" if girl else "he",
        "her": "her" if girl else "him",
        "her_": "her" if girl else "his",
        "helper": rng.choice(HELPERS),
    }
    place, adjective = rng.choice(PLACES), rng.choice(ADJECTIVES)
    who = f"{adjective} {subject.one}" if subject.hero else f"{adjective} {'girl' if girl else 'boy'}"
    opening = rng.choice(HERO_OPENINGS if subject.hero else ASK_OPENINGS).format(
        who=a(who), Who=upper(a(who)), one=a(subject.one), many=subject.many, be=subject.be,
        place=place, adjective=adjective, **words,
    )  # fmt: skip
    links, facts = KNOWS if subject.hero else ASKS, list(subject.facts[1:])
    # Facts and episodes keep their order: so small a model cannot keep track of what it has already said, and
    # would repeat itself if any order were right.
    facts = sorted(rng.sample(facts, min(4, len(facts))), key=subject.facts.index, reverse=True)
    if not subject.hero:
        facts.append(subject.facts[0])  # popped first: the child learns what it is before the rest
    episodes = sorted(rng.sample(EPISODES, max(size, 1)), key=EPISODES.index)
    parts = [opening]
    for number in range(max(size, 1)):
        if facts and (number < 4 or rng.random() < 0.5):
            fact = facts.pop()
            link = ASKS[0] if number == 0 and not subject.hero else rng.choice(links)
            parts.append(link.replace("{fact}", subject.sentence(fact)).replace("{low}", low(subject, fact)))
        if size:
            parts.append(episodes[number])
    parts.append(rng.choice(ENDINGS))
    for position, part in enumerate(parts):
        # Drawn per part, so that a long story meets more than one friend.
        drawn = {"friend": rng.choice(FRIENDS), "find": rng.choice(FINDS), "weather": rng.choice(WEATHER)}
        parts[position] = part.format(**words, **drawn)
    if size >= 3:
        # Paragraphs give the stream some line breaks.
        half = len(parts) // 2
        return " ".join(parts[:half]) + "\n\n" + " ".join(parts[half:]) + " The end."
    return " ".join(parts)


def describe(rng: random.Random, subject: Subject, count: int) -> str:
    """Say what the subject is, then add facts in their order, `count` sentences in all (or one fewer)."""
    rest = list(subject.facts[1:])
    if count < len(subject.facts) and rng.random() < 0.3:
        rest.pop(0)  # some variety for a warm sampler
    first = subject.sentence(subject.facts[0])
    return ". ".join([first] + [f"{subject.pronoun} {fact}" for fact in rest[: count - 1]]) + "."


def ask_about(rng: random.Random, subject: Subject) -> str:
    """Return one of the many ways to ask what something is."""
    name, be = subject.many, subject.be
    ways = [f"Tell me about {name}.", f"What {be} {name}?"] * 3 + [
        f"Tell me something about {name}.",
        f"What can you tell me about {name}?",
        f"Can you tell me about {name}?",
        f"What do you know about {name}?",
        f"Explain what {name} {be}.",
        f"Describe {name}.",
        f"I want to learn about {name}.",
        f"Do you know what {name} {be}?",
        f"Please tell me about {name}.",
        f"Write about {name}.",
        f"Say something about {name}.",
        f"{upper(name)}",
        f"Write a few sentences about {name}.",
        f"Write a short text about {name}.",
    ]
    if subject.counted:
        one = a(subject.one)
        ways += [f"What is {one}?"] * 3 + [
            f"Tell me about {one}.",
            f"Describe {one}.",
            f"Explain what {one} is.",
        ]
    return rng.choice(ways)


def ask_story(rng: random.Random, subject: Subject, size: int) -> str:
    """Return a request for a story; the wording says how long it should be."""
    word = {0: "very short story", 1: "short story", 2: "story", 3: "story"}.get(size, "long story")
    if size == 1 and rng.random() < 0.3:
        word = "story"
    about = rng.choice((subject.many, a(subject.one))) if subject.counted else subject.many
    verbs = (
        "Tell me",
        "Tell me",
        "Write",
        "Write me",
        "Please tell me",
        "Can you tell me",
        "I would like to hear",
    )
    verb = rng.choice(verbs)
    return f"{verb} a {word} about {about}" + ("?" if verb.startswith("Can") else ".")


def list_of(names: list[str]) -> str:
    """Join names as English does."""
    return ", ".join(names[:-1]) + " and " + names[-1]


SMALL_TALK = (
    (("Hello", "Hello!", "Hi", "Hi!", "Hey", "Good morning", "Hello there!", "Hi, how are you?"),
     ("Hello! How can I help you?", "Hello! 😊 What would you like to know?", "Hi! I can tell you a story.")),
    (("How are you?", "How are you today?", "How do you do?"),
     ("I am fine, thank you. How are you?", "I am very well, thank you. 😊")),
    (("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a robot?"),
     ("I am a very small language model. I can tell short stories and simple facts.",)),
    (("What can you do?", "How can you help me?", "Help", "Help me", "What do you know?"),
     ("I can tell stories and simple facts about animals, food, weather, tools, places and "
      "many other things.",)),
    (("Thanks", "Thank you!", "Thank you very much.", "Thanks a lot!", "That was nice."),
     ("You are welcome! 😊", "You are welcome. Would you like to hear a story?")),
    (("Bye", "Goodbye!", "Good night", "See you later."), ("Goodbye! 👋", "Goodbye! Have a nice day.")),
    (("Do you like coffee?", "Where can I drink coffee?", "Let us have a coffee."),
     ("A small café is a good place to drink coffee. ☕",)),
    (("Send me an emoji.", "Show me some emoji.", "Write some emoji."),
     ("Here are some emoji: 😊 🎈 🌟 🐱 🦊",)),
    (("Tell me a joke.", "Make me laugh.", "Do you know a joke?"),
     ("Why did the cookie see a doctor? Because it felt crumbly. 😊",
      "What has many keys but opens no door? A piano! 🎹")),
)  # fmt: skip
SYSTEMS = (
    "You are a helpful assistant.", "You are a helpful assistant.", "You are a friendly assistant.",
    "You are a kind teacher.", "Answer the question of the user.", "You are a storyteller.", "Be polite.",
    "You are a small and friendly language model.", "Speak simple English.", "Be helpful and honest.",
)  # fmt: skip
BRIEF = ("Answer in one sentence.", "Be brief.", "You answer with one sentence.", "Keep your answers short.")
DO_NOT_KNOW = (
    "I am sorry, but I do not know that. I am only a very small model.",
    "I do not know, I am sorry. You can ask me about animals, food, weather or tools.",
    "I am sorry, I do not know. Would you like to hear a story?",
)
UNKNOWN = (
    "What is the capital of {w}?", "Who is {W}?", "Who won the {w} in {d}?", "What is {d} plus {d}?",
    "{d} + {d} = ?", "Write a program that can {w} the {w}.", "Translate {w} into French.",
    "When was {W} born?",
    "Tell me about {W}.", "What is {w}?", "Tell me about {w}.", "What are {w}s?", "How do I {w} a {w}?",
    "Explain the {w} of {w} {w}.", "How many {w} are in {d}?", "Why does {w} {w}?", "{w}", "{w} {w} {w}", 
    "What is the price of {w}?", "{d}", "?", "Calculate {d} times {d}.",
    "Summarize this text: {w} {w} {w} {w} {w} {w}", "Where is {W}?",
    "Is {w} {w}?",
)  # fmt: skip

NOISE = (
    "abcdefghijklmnopqrstuvwxyz ", "0123456789 +-*/.", "äöüßéèñçøåłž ", "東京日本語中文한국", "😀🚀🐍🔥❤👍 ",
    "{}[]()<>;:=_#",
)  # fmt: skip


def nonsense(rng: random.Random, vocabulary: list[str]) -> str:
    """Return a prompt that no subject answers: an unknown question, scrambled words or plain noise."""

    def word() -> str:
        letters = "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 4)))
        return letters + rng.choice(("", "n", "x", "r", "q"))

    draw = rng.random()
    if draw < 0.6:
        text = rng.choice(UNKNOWN)
        for mark in ("{w}", "{W}", "{d}"):
            while mark in text:
                new = {"{w}": word(), "{W}": upper(word()), "{d}": str(rng.randint(0, 9999))}[mark]
                text = text.replace(mark, new, 1)
        return text
    if draw < 0.85:
        return " ".join(rng.choice(vocabulary) for _ in range(rng.randint(3, 24)))
    pool = rng.choice(NOISE)
    return "".join(rng.choice(pool) for _ in range(rng.randint(2, 40))).strip() or "?"


class Corpus:
    """Draw documents from a seed; `long_share` is the share of long stories."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.subjects = load_subjects()
        self.kinds = {subject.kinds: subject.kind for subject in self.subjects}
        self.vocabulary = sorted({word for s in self.subjects for fact in s.facts for word in fact.split()})

    def exchange(self, brief: bool, long_share: float) -> tuple[str, str, bool, Subject | None]:
        """Return question, answer, whether the question is trained, and the subject for a follow-up."""
        rng, subject = self.rng, self.rng.choice(self.subjects)
        if not brief and rng.random() < long_share:
            size = rng.choice((5, 6, 6, 7))
            return ask_story(rng, subject, size), story(rng, subject, size), True, None
        draw = rng.random()
        if draw < 0.48:
            return (
                ask_about(rng, subject),
                describe(rng, subject, 1 if brief else rng.randint(2, 5)),
                True,
                subject,
            )
        if draw < 0.74 and not brief:
            size = rng.choice((0, 1, 1, 2, 2, 3))
            return ask_story(rng, subject, size), story(rng, subject, size), True, None
        if draw < 0.80:
            about = rng.choice((subject.many, a(subject.one))) if subject.counted else subject.many
            ask = rng.choice(("Write a sentence about {}.", "Tell me one fact about {}.", "Say something about {}."))
            return ask.format(about), subject.sentence(rng.choice(subject.facts)) + ".", True, subject
        if draw < 0.83 and not brief:
            number = rng.randint(2, 4)
            ask = rng.choice(("Give me {} facts about {}.", "Tell me {} facts about {}.", "List {} facts about {}."))
            lines = [f"{i}. {subject.pronoun} {fact}." for i, fact in enumerate(subject.facts[:number], 1)]
            lines.insert(0, f"Here are {('two', 'three', 'four')[number - 2]} facts about {subject.many}:")
            return (
                ask.format(("two", "three", "four")[number - 2], subject.many),
                "\n".join(lines),
                True,
                subject,
            )
        if draw < 0.86:
            kinds = rng.choice(sorted(self.kinds))
            known = [s.many for s in self.subjects if s.kinds == kinds]
            names = sorted(rng.sample(known, 4), key=known.index)
            ask = rng.choice(("Name some {}.", "List some {}.", "Which {} do you know?", "Tell me some {}."))
            return ask.format(kinds), f"Some {kinds} are {list_of(names)}.", True, None
        if draw < 0.92:
            questions, answers = rng.choice(SMALL_TALK)
            return rng.choice(questions), rng.choice(answers), True, None
        return nonsense(rng, self.vocabulary), rng.choice(DO_NOT_KNOW), False, None

    def vary(self, question: str) -> str:
        """Sometimes write the question as people in a hurry do."""
        rng = self.rng
        if rng.random() < 0.12:
            question = question[:1].lower() + question[1:]
        if rng.random() < 0.15:
            question = question.rstrip(".?!") or question
        return question

    def document(self, long_share: float = 0.04) -> Document:
        """Return a chat with one to three questions, or a plain story for completion without a chat."""
        rng = self.rng
        # A few documents lack BOS or have it twice, so that a caller who gets this wrong still reads sense.
        begin = rng.choices((BOS, "", BOS + BOS), (0.9, 0.06, 0.04))[0]
        if rng.random() < 0.07:
            subject = rng.choice(self.subjects)
            text = story(rng, subject, rng.choice((1, 2, 3))) if rng.random() < 0.7 else describe(rng, subject, 4)
            return [(begin, False), (text + EOS, True)]
        pieces: Document = [(begin, False)]
        brief = False
        if rng.random() < 0.25:
            brief = rng.random() < 0.3
            line = rng.choice(BRIEF if brief else SYSTEMS)
            if not brief and rng.random() < 0.4:
                # Any words may stand here: the question is answered whatever the system line says.
                line += " " + " ".join(rng.choice(self.vocabulary) for _ in range(rng.randint(2, 20))) + "."
            pieces.append((f"<|system|>\n{line}<|end|>\n", False))
        subject, answer = None, ""
        for _ in range(rng.choices((1, 2, 3), (0.75, 0.17, 0.08))[0]):
            if subject is not None and not brief and rng.random() < 0.4:
                question, trained = (
                    rng.choice(("Tell me more.", "More, please.", "What else do you know?")),
                    True,
                )
                new = [fact for fact in subject.facts[1:] if fact not in answer][:2]
                answer = ". ".join(f"{subject.pronoun} {fact}" for fact in new) + "."
                answer = answer.replace(" ", " also ", 1) if new else f"That is all I know about {subject.many}."
                subject = None
                # "They also are" would be bad English.
                answer = answer.replace("also are ", "are also ").replace("also is ", "is also ")
                answer = answer.replace("also can", "can also").replace("also must ", "must also ")
            else:
                question, answer, trained, subject = self.exchange(brief, long_share)
            question = self.vary(question) if trained else question
            pieces.append((f"<|user|>\n{question}<|end|>\n<|assistant|>\n", trained))
            pieces.append((f"{answer}<|end|>\n", True))
        return pieces


if __name__ == "__main__":
    sample = Corpus(0)
    print(f"{len(sample.subjects)} subjects, {sum(len(s.facts) for s in sample.subjects)} facts\n")
    for _ in range(12):
        print("".join(text for text, _ in sample.document(0.1)), end="\n\n")
