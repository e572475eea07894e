"""The names of CIFAR's classes in label order, for files that come without them.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; of CIFAR-100
the fine labels, which are in alphabetical order.
"""

from __future__ import annotations

from collections.abc import Mapping

_TEN = "airplane automobile bird cat deer dog frog horse ship truck"
_HUNDRED = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain
plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CIFAR_NAMES: Mapping[str, tuple[str, ...]] = {
    "cifar10": tuple(_TEN.split()),
    "cifar100": tuple(_HUNDRED.split()),
}
"""Dataset -> names."""
