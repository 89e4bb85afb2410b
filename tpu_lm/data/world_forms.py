"""The sentences in which the little world is told, as weighted templates.

Slots: P Q R people (Q is not P, R neither), I an inhabitant of T, V a visitor
from elsewhere, T a town (not P's own), A quality, C colour, X thing, F food
(G another), D day, M month, W weather, N number; `{P.home}` and the like are
looked up. {S} {s} {Ss} {o} are P as subject, possessive and object, by name
or by pronoun. A slot that the document has not bound is drawn, and holds for
its sentence.
"""

from tpu_lm.data import world_facts
from tpu_lm.data.world_facts import number_word, words
from tpu_lm.data.world_grammar import Template, forms

DAYS = words('Monday Tuesday Wednesday Thursday Friday Saturday Sunday')
MONTHS = words(
  'January February March April May June July August September October '
  'November December'
)
WEATHER = words('sunny rainy windy cloudy foggy cold warm stormy')
QUALITIES = words('big small new heavy plain fine cheap rare pretty long')
PLAIN_SLOTS = {
  'A': QUALITIES,
  'C': world_facts.COLOURS,
  'X': world_facts.THINGS,
  'F': world_facts.FOODS,
  'D': DAYS,
  'M': MONTHS,
  'W': WEATHER,
  'N': [number_word(n) for n in range(2, 13)],
}
PERSON_FACTS = {
  'home': forms("""
    4 {S} lives in {P.home}.
    2 {Ss} home is in {P.home}.
    1 {S} has a small house in {P.home}.
    1 In {P.home} you can meet {o} on any day.
  """),
  'job': forms("""
    4 {S} works as a {P.job}.
    2 {S} is a {P.job} and {P.does}.
    2 {S} {P.does}.
    1 {Ss} trade is that of a {P.job}.
  """),
  'belonging': forms("""
    4 {S} owns a {P.colour} {P.thing}.
    2 The {P.colour} {P.thing} belongs to {o}.
    2 {S} is proud of {his} {P.colour} {P.thing}.
    1 {Ss} {P.thing} is {P.colour}.
  """),
  'food': forms("""
    4 {S} likes {P.food}.
    2 {Ss} favourite food is {P.food}.
    1 Nothing pleases {o} more than {P.food}.
    1 {S} cannot say no to {P.food}.
  """),
  'friend': forms("""
    4 {Ss} best friend is {P.friend}.
    2 {S} and {P.friend} are best friends.
    2 {Ss} best friend is {P.friend}, who lives in {P.friendhome}.
    1 {Ss} best friend, {P.friend}, is a {P.friendjob}.
  """),
}

HABITS = forms("""
  2 Every {D} {s} buys {F} in {T}.
  2 In {M} {s} went to {T} with {Q} and {R}.
  2 {S} found a {A} {C} {X} near {T}.
  2 {S} often eats {F} with {Q} and {R}.
  1 {S} would give {N} coins for a {A} {C} {X}.
  1 On a {W} {D} {s} visits {Q}.
  2 Last {M} {s} sold {Q} a {A} {C} {X}.
""")

TOWN_FACTS = {
  'river': forms("""
    4 {T} lies by the river {T.river}.
    2 The river {T.river} flows through {T}.
    1 The children of {T} swim in the {T.river}.
  """),
  'product': forms("""
    4 {T} is known for its {T.product}.
    2 People travel far to buy {T.product} in {T}.
    1 Nowhere do they make {T.product} as they do in {T}.
  """),
  'landmark': forms("""
    4 There is a {T.landmark} in {T}.
    2 A {T.landmark} stands in the middle of {T}.
    1 The {T.landmark} of {T} is very old.
  """),
}

TOWN_LIFE = forms("""
  1 {I} {I.does} here.
  1 Here lives {I}, who likes {I.food}.
  1 On {D} {V} came from {V.home} to see the {T.landmark}.
  4 In {M} {V} bought {N} {A} {C} {X}s here.
  4 {V} had {F} and {G} here on {D}.
  3 On a {W} {D} {V} lost a {A} {C} {X} here.
  2 {V} sold {I} a {A} {C} {X}.
""")

STORY_OPENINGS = forms("""
  3 On {D} {P} walked from {P.home} to {T}.
  2 Early on {D} {P} set out for {T}.
  2 {P}, a {P.job} from {P.home}, came to {T} in {M}.
  2 One {W} {D} in {M} {P} left {P.home} for {T}.
  2 It was {W} when {P} came to {T} to buy a {A} {C} {X}.
""")
STORY_MEETINGS = forms("""
  3 By the {T.landmark} {he} met {Q}.
  2 {Q} was at the {T.landmark} with {R}.
  2 By the {T.river} {he} saw {Q} with a {A} {C} {X}.
  2 There {he} met {Q}, a {Q.job} from {Q.home}.
  1 The first to greet {him} was {Q}.
""")
STORY_MIDDLES = forms("""
  2 "I need a {A} {C} {X}," {he} said.
  3 {Q} gave {him} {F} and {G}.
  1 They spoke of {R}, who {R.does} in {R.home}.
  1 {Q} praised the {T.product} of {T}.
  1 {He} showed {Q} {his} {P.colour} {P.thing}.
  3 {Q} paid {him} {N} coins for a {A} {C} {X}.
  1 {He} thought of {P.friend}, {his} best friend, and bought {F}.
  2 They had {F}, and {he} told {Q} about {R}.
  3 "{R} was here on {D} with {F}," said {Q}.
  3 "Tell {R} to bring {N} {A} {C} {X}s," said {Q}.
""")
STORY_CLOSINGS = forms("""
  3 In the evening {he} went home to {P.home}.
  2 {He} was back in {P.home} by {D}.
  1 {He} stayed in {T} until {D}.
  2 At night {he} dreamed of {F} and a {A} {C} {X}.
  2 On the way home {he} lost a {A} {C} {X}.
""")

LETTER_OPENING = Template.parse('A letter from {P} to {Q}\n\nDear {Q},\n')
LETTER_BODY = forms("""
  2 I am in {T} with {R}.
  1 All is well in {P.home}.
  3 On {D} I met {R} in {T}.
  4 {R} sends you {F} and a {A} {C} {X}.
  1 My {P.colour} {P.thing} is as good as new.
  1 Do you still like {Q.food} so much?
  4 Please bring me a {A} {C} {X} in {M}.
  2 Can you lend me {N} coins until {D}?
  1 How is life in {Q.home}?
  1 A {P.job} has much to do in {M}.
  3 {R} will visit you on {D}.
  1 Is your {Q.thing} still {Q.colour}?
  4 I dreamed that {R} gave me {N} {A} {X}s.
  3 It is {W}, and I am having {F} with {G}.
""")
LETTER_CLOSINGS = forms("""
  3 Yours, {P}
  2 Your friend {P}
  1 With love from {P.home}, {P}
""")

NEWS_HEADS = forms("""
  2 News of {D}:
  2 What people say in {T}:
  1 From the {T} post, {D}:
""")
EVENTS = forms("""
  3 {P} met {Q} in {T}.
  4 {P} sold {Q} a {A} {C} {X}.
  2 {P} gave {Q} {F} and {G}.
  2 {P} went from {P.home} to {T}.
  2 On {D} {P} saw {Q} and {R} in {T}.
  2 {P} and {Q} had {F} with {R}.
  1 {P} lent {Q} the {P.colour} {P.thing}.
  3 {P} asked {Q} for {N} {A} {X}s.
  2 {P} lost a {A} {C} {X} near {T}.
  1 {P} told {Q} about the {T.landmark} of {T}.
  1 It was {W} in {T} on {D}.
  1 {Q} will visit {P} in {P.home} on {D}.
""")

LEDGER_HEADS = forms("""
  2 Sold in {T} in {M}
  1 Lost and found in {T}
  1 The guests of {P} on {D}
  1 Wanted in {T} by {D}
""")
LEDGER_LINES = forms("""
  4 {P}: {N} {A} {C} {X}s
  3 {P}: {A} {C} {X}, {F}
  3 {P}: {F} and {G}
  2 {P} with {Q}: {A} {X}, {F}
  2 {P}, {Q} and {R}: {N} {X}s
  1 {P} from {P.home}: {C} {X}
""")

QUESTION_HEADS = forms("""
  2 Questions for {D}:
  1 A quiz from {T}:
  1 What {P} wants to know:
""")
QUESTIONS = forms("""
  6 Where does {P} live?
  4 What does {P} do for a living?
  2 What is the trade of {P}?
  4 What does {P} own?
  2 Who owns the {P.colour} {P.thing}?
  3 What does {P} like to eat?
  4 Who is the best friend of {P}?
  1 Where does the best friend of {P} live?
  3 Which river flows through {T}?
  2 What is {T} known for?
  2 What stands in the middle of {T}?
  3 Who met {P} in {T} on {D}?
  4 Did {P} sell {Q} a {A} {C} {X}?
  2 Does {P} know {Q} and {R}?
  2 Will {P} visit {Q} in {M}?
  2 Does {P} need {N} {A} {X}s?
  3 Did {P} eat {F} with {Q}?
""")
