"""The text that ``tpctl bench quality`` takes where none is given, written for this package: prose, a letter, a recipe,
a list, code, a table and a conversation, so that many kinds of tokens occur. Its perplexity compares forms of a model
with each other, and with no figure of another text."""

PASSAGE = """\
The ferry to the island leaves twice a day in summer and once in winter, unless the wind is from the north. Most of \
the people who wait for it on the quay know each other, and they talk about the price of diesel, the new teacher, \
and whether the harbour will be dredged before the autumn storms. The harbour master, a tall woman with a grey \
braid, writes the names of the passengers in a notebook, although a machine has printed tickets since 2014. "The \
machine does not know who is missing," she says when somebody asks her about it. In thirty-one years she has sent \
the boat back only once, for a boy who had fallen asleep behind the lobster pots.

On the island there are two roads, one shop, a church without a priest and a lighthouse without a keeper. The shop \
sells bread on Tuesdays and Fridays. In the lighthouse a lamp that is no larger than a fist does what forty mirrors \
and a barrel of oil used to do, and a computer on the mainland switches it on at dusk. Visitors climb the 142 steps, \
take a photograph of the sea, and climb down again. What they do not see from up there is the wall that the \
islanders built against the sea after the flood of 1953, stone upon stone, with nothing but two carts and a borrowed \
horse.

Dear Mr Hollis,

Thank you for your letter of 3 March and for the plans of the new pumping station. I have three remarks. First, the \
drawing on page 4 shows the inlet at a depth of 2.5 metres, but the text says 3.2 metres; please tell us which of \
the two is right. Second, the noise of the pumps must not exceed 45 decibels at the nearest house, measured at night \
with the windows open. Third, we would like to keep the old brick building, which is not protected by law but loved \
by everybody who grew up here. If you could answer before the end of the month, the council will be able to vote on \
the fourteenth of April.

Yours sincerely,
Agnes Moreau

How to bake a plain loaf

1. Mix 500 g of flour with 10 g of salt and 3 g of dry yeast.
2. Add 350 ml of lukewarm water and stir until no dry flour is left.
3. Cover the bowl and let it stand for twelve to eighteen hours; the dough should double in size and smell faintly \
sour.
4. Fold the dough four times on a floured board, form a ball, and let it rest for another hour.
5. Heat the oven to 240 degrees with a heavy pot inside. Put the dough into the hot pot and close the lid.
6. Bake it for thirty minutes, take off the lid, and bake it for ten to fifteen minutes more, until the crust is \
dark brown. The loaf is done when it sounds hollow if you knock on its bottom. Let it cool before you cut it, \
however hard that is.

Why is the sky blue? Sunlight contains all colours. When it passes through the air, molecules that are much smaller \
than its wavelength scatter it in every direction, and they scatter short wavelengths far more than long ones: the \
strength grows with the inverse of the fourth power of the wavelength. Blue light is therefore scattered about five \
times as strongly as red light, and reaches our eyes from all parts of the sky. In the evening, when the light has \
travelled a long way through the air, most of the blue has been scattered out of it, and what is left is orange and \
red. Violet has an even shorter wavelength than blue, but the sun sends less of it, the upper atmosphere absorbs a \
part of that, and our eyes are not very sensitive to it.

def median(values):
    \"\"\"The middle of the values, or the mean of the two in the middle.\"\"\"
    ordered = sorted(values)
    if not ordered:
        raise ValueError("there is no median of nothing")
    half = len(ordered) // 2
    if len(ordered) % 2 == 1:
        return ordered[half]
    return (ordered[half - 1] + ordered[half]) / 2


for line in open("temperatures.csv", encoding="utf-8"):
    day, *readings = line.strip().split(",")
    print(f"{day}: {median([float(reading) for reading in readings]):.1f}")

| month | rain in mm | days with rain | hours of sun |
|---|---|---|---|
| January | 61 | 17 | 48 |
| April | 42 | 13 | 163 |
| July | 78 | 14 | 217 |
| October | 57 | 14 | 106 |

It rained on 14 days in July, as often as in October, but July had more than twice as many hours of sun. The wettest \
month of the four was also the sunniest, because in summer the rain falls in short and heavy showers.

"Did you bring the map?" asked Ines.

"I thought you had it," said her brother. He turned his pockets inside out: a pencil, two tickets, half of a biscuit.

"Then we do it as grandfather did. The sun is over there, it is four in the afternoon, so that way is west, more or \
less. The river runs from east to west, and the village is on the river."

"And if it is the wrong river?"

"Then there will be another village."

They went down through the beeches. After an hour they heard water, and after another quarter of an hour they saw a \
bridge, and on the bridge a man who was painting the railing green. He had finished exactly half of it. When they \
asked him how far it was to the village, he pointed with his brush over his shoulder, and a drop of paint fell on \
the map that lay open beside the bucket.

Numbers, too, have their habits. Every prime number above 3 lies beside a multiple of 6. The sum of the first n odd \
numbers is n squared: 1 + 3 + 5 + 7 = 16. If you write down the digits of a number, reverse them, and take the \
smaller from the larger, the difference can always be divided by 9; for 8,231 and 1,328 it is 6,903, which is 9 \
times 767. A proof of the last fact takes two lines, since a number and the sum of its digits leave the same \
remainder when they are divided by 9, and reversing the digits does not change their sum.

The first bicycles had no chain. The pedals were fixed to the front wheel, so that one turn of the pedals was one \
turn of the wheel, and the only way to go faster was to make the wheel larger. By 1880 some were a metre and a half \
high, and a rider who met a stone flew over the handlebars. The chain changed that: with a large sprocket at the \
pedals and a small one at the wheel, the wheel turns several times for each turn of the legs. Two wheels of the same \
moderate size were enough, the rider sat between them and could put a foot on the ground, and within ten years the \
high wheel had become a curiosity. The safety bicycle, as it was called, has hardly changed its shape since then.
"""
