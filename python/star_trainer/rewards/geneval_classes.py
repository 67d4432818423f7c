"""The classes that GenEval's prompts are made of, and what detectors of COCO call them."""

from __future__ import annotations

from collections.abc import Mapping

# The ten colours among which GenEval has CLIP choose.
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_COMMA_SEPARATED = """\
person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,\
bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,\
sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,\
bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,\
toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,\
clock,vase,scissors,teddy bear,hair drier,toothbrush"""
CLASSES = tuple(_COMMA_SEPARATED.split(","))
# Without spaces, as they are compared: COCO's names and those of older label files.
_OTHER_NAMES = {
    **{"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"},
    **{"sofa": "couch", "tvmonitor": "tv", "television": "tv", "motorbike": "motorcycle", "aeroplane": "airplane"},
    **{"mobilephone": "cell phone", "hairdryer": "hair drier", "doughnut": "donut"},
}
_BY_LETTERS = {"".join(name.split()): name for name in CLASSES} | _OTHER_NAMES


def geneval_names(labels: Mapping[int, str]) -> dict[int, str]:
    """GenEval's name for each class of a detector; what GenEval has no name for keeps its own.

    Raises:
        ValueError: classes of GenEval that the detector has none for; the message names them.
    """
    names = {
        index: _BY_LETTERS.get("".join(filter(str.isalnum, label.lower())), label) for index, label in labels.items()
    }
    if lacking := [name for name in CLASSES if name not in names.values()]:
        shown = ", ".join(lacking[:5])
        raise ValueError(f"expected the {len(CLASSES)} classes of GenEval, {len(lacking)} are not there: {shown}")
    return names
