"""Steps against guidance in one sheet, with a number for each picture, as a page to look at and to send to others.

    python examples/sheets_and_report.py [MODEL PROMPT]

Writes sheets/report.html beside sheet.png, .json and .csv. Stopped and started again, it goes on.
"""

import sys

import lcmlora
from lcmlora.sheets.metrics import distance


def main(model="pocket", prompt="a fox on a teal background"):
    sheet = lcmlora.sweep(
        lcmlora.load(model),  # accelerated for the cells that need it, and given back
        prompt,
        x={"steps": (1, 2, 4, 8)},
        y={"guidance": (1, 1.5, 2)},
        without={"steps": 25},  # a first column of the pipe as it is
        metrics={"distance": distance()},  # from the picture without
        folder="sheets",  # keeps each picture as soon as it is drawn, and the sheet in the end
    )
    print(sheet.to_html("sheets/report.html"))


if __name__ == "__main__":
    main(*sys.argv[1:])
