"""Sentences that hold a key and a value: the wording of synthetic records (`atma.data.recall`).

`{word}` stands for a word with a space before it, `{key}` for three to eight digits, `{value}` for five. The sentence
of the needle evaluation ("The access code for record …") is left out on purpose: it stays unseen in training.
"""

TEMPLATES = (
    " The{word}{word} of{word} {key} is {value}",
    " The{word} number for{word} {key} is{value}",
    " Please remember that{word} {key} has the{word} {value}",
    " In{word}{word}, item {key} was marked {value}",
    " The{word} in box {key} reads{value}",
    " Note:{word}{word} {key} ={value}",
    "\n#{word} {key}:{word} {value}\n",
    "\n{word}[{key}] = {value}\n",
    "\n    {word}({key},{word}={value})\n",
    " To open{word} {key}, dial{value}",
    " My{word} for the{word} {key} is{value}",
    ' "{word}": {key}, "{word}": {value},',
    " We wrote{word} {key} beside{word} {value}",
    " Ticket {key} belongs to{word}{word}{value}",
)

WORDS = """
account amber anchor apple arrow autumn barrel basket beacon bottle branch bridge button cabin candle canvas
carbon castle cedar chapter circle cloud coffee copper corner cotton crystal dealer desert diamond dragon drawer
eagle engine entry falcon feather field filter flower forest frame garden ghost glass harbour hammer hotel index
island ivory jacket journal kettle key ladder lantern ledger lemon letter library locker magnet maple marble
market member meadow mirror motor mountain number ocean office orange orchid packet paper parcel pencil pepper
pilot planet pocket port prism queen quiet rabbit radio record region river rocket room saddle safe sample
school serial shadow signal silver spring station storm street summer tablet temple ticket timber token tower
track tunnel user valley value vault vector velvet version village violin wagon water window winter wizard
yellow zone
"""
