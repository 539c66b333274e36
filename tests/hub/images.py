"""The sets of images: small patterns whose colour and stripes tell the class."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow

from .glue import OTHER, TRAIN


def _words(text: str) -> list[str]:
    return text.split()


_CIFAR10 = _words("airplane automobile bird cat deer dog frog horse ship truck")
_CIFAR100 = _words(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch cra crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """
)
_COARSE = _words(
    """
    aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
    household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes
    large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees
    vehicles_1 vehicles_2
    """
)
_FOOD = _words(
    """
    apple_pie baby_back_ribs baklava beef_carpaccio beef_tartare beet_salad beignets bibimbap bread_pudding
    breakfast_burrito bruschetta caesar_salad cannoli caprese_salad carrot_cake ceviche cheesecake cheese_plate
    chicken_curry chicken_quesadilla chicken_wings chocolate_cake chocolate_mousse churros clam_chowder
    club_sandwich crab_cakes creme_brulee croque_madame cup_cakes deviled_eggs donuts dumplings edamame
    eggs_benedict escargots falafel filet_mignon fish_and_chips foie_gras french_fries french_onion_soup
    french_toast fried_calamari fried_rice frozen_yogurt garlic_bread gnocchi greek_salad grilled_cheese_sandwich
    grilled_salmon guacamole gyoza hamburger hot_and_sour_soup hot_dog huevos_rancheros hummus ice_cream lasagna
    lobster_bisque lobster_roll_sandwich macaroni_and_cheese macarons miso_soup mussels nachos omelette onion_rings
    oysters pad_thai paella pancakes panna_cotta peking_duck pho pizza pork_chop poutine prime_rib
    pulled_pork_sandwich ramen ravioli red_velvet_cake risotto samosa sashimi scallops seaweed_salad
    shrimp_and_grits spaghetti_bolognese spaghetti_carbonara spring_rolls steak strawberry_shortcake sushi tacos
    takoyaki tiramisu tuna_tartare waffles
    """
)
_TEXTURES = _words(
    """
    banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline dotted fibrous flecked
    freckled frilly gauzy grid grooved honeycombed interlaced knitted lacelike lined marbled matted meshed paisley
    perforated pitted pleated polka-dotted porous potholed scaly smeared spiralled sprinkled stained stratified
    striped studded swirly veined waffled woven wrinkled zigzagged
    """
)
_PETS = _words(
    """
    abyssinian american_bulldog american_pit_bull_terrier basset_hound beagle bengal birman bombay boxer
    british_shorthair chihuahua egyptian_mau english_cocker_spaniel english_setter german_shorthaired great_pyrenees
    havanese japanese_chin keeshond leonberger maine_coon miniature_pinscher newfoundland persian pomeranian pug
    ragdoll russian_blue saint_bernard samoyed scottish_terrier shiba_inu siamese sphynx staffordshire_bull_terrier
    wheaten_terrier yorkshire_terrier
    """
)
_CATS = {0, 5, 6, 7, 9, 11, 20, 23, 26, 27, 32, 33}
_LAND = [
    "annual crop land",
    "forest",
    "brushland or shrubland",
    "highway or road",
    "industrial buildings or commercial buildings",
    "pasture land",
    "permanent crop land",
    "residential buildings or homes or apartments",
    "river",
    "lake or sea",
]
_CORRUPTED = _words("contrast gaussian_noise impulse_noise jpeg_compression motion_blur pixelate spatter")


def _picture(label: int, random: np.random.Generator, width: int, height: int, mode: str) -> dict[str, Any]:
    """A PNG in the colour of the class, with stripes of its width, and noise."""
    colour = np.random.default_rng(label).integers(40, 215, 3)
    stripes = (np.arange(width) // (2 + label % 5) % 2)[None, :, None] * 40
    noise = random.normal(0, 8, (height, width, 3))
    pixels = (colour + stripes + noise).clip(0, 255).astype(np.uint8)
    file = BytesIO()
    Pillow.fromarray(pixels).convert(mode).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def _set(
    image: str, label: str, names: list[str], splits: list[str], width: int, height: int, pets: bool = False
) -> DatasetDict:
    features: dict[str, Any] = {image: Image(), label: ClassLabel(names=names)}
    if names is _CIFAR100:
        features["coarse_label"] = ClassLabel(names=_COARSE)
    if pets:
        features |= {"image_id": Value("string"), "label_cat_dog": ClassLabel(names=["cat", "dog"])}
    # So few of the classes that each has several examples, the first and the last among them.
    classes = np.linspace(0, len(names) - 1, 8).round().astype(int).tolist()
    made = {}
    for seed, split in enumerate(splits):
        random = np.random.default_rng(seed)
        rows = []
        for index in range(TRAIN if split == "train" else OTHER):
            kind = int(random.choice(classes))
            # A few of the real pets' pictures are grey, which a model of three channels must not stumble over.
            picture = _picture(kind, random, width, height, "L" if pets and index == 5 else "RGB")
            row = {image: picture, label: kind, "coarse_label": kind // 5, "image_id": f"{names[kind]}_{index}"}
            rows.append({**row, "label_cat_dog": int(kind not in _CATS)})
        columns = {name: [row[name] for row in rows] for name in features}
        made[split] = Dataset.from_dict(columns, Features(features))
    return DatasetDict(made)


def image_sets() -> dict[str, dict[str, DatasetDict]]:
    """The sets by repository and configuration."""
    both = ["train", "test"]
    land = [*both, *_CORRUPTED]
    return {
        "uoft-cs/cifar10": {"plain_text": _set("img", "label", _CIFAR10, both, 32, 32)},
        "uoft-cs/cifar100": {"cifar100": _set("img", "fine_label", _CIFAR100, both, 32, 32)},
        "ethz/food101": {"default": _set("image", "label", _FOOD, ["train", "validation"], 48, 36)},
        "tanganke/dtd": {"default": _set("image", "label", _TEXTURES, both, 40, 48)},
        "tanganke/eurosat": {"default": _set("image", "label", _LAND, land, 64, 64)},
        "timm/oxford-iiit-pet": {"default": _set("image", "label", _PETS, both, 44, 52, pets=True)},
    }
