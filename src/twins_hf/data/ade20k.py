"""The ADE20K benchmark (ADEChallengeData2016): its archive, and its 150 classes by class id from 0."""

import dataclasses
from pathlib import Path

import aiohttp
from datasets import DownloadConfig, DownloadManager
from huggingface_hub.utils.sha import sha_fileobj

ADE20K_CLASSES = (
    "wall",
    "building, edifice",
    "sky",
    "floor, flooring",
    "tree",
    "ceiling",
    "road, route",
    "bed",
    "windowpane, window",
    "grass",
    "cabinet",
    "sidewalk, pavement",
    "person, individual, someone, somebody, mortal, soul",
    "earth, ground",
    "door, double door",
    "table",
    "mountain, mount",
    "plant, flora, plant life",
    "curtain, drape, drapery, mantle, pall",
    "chair",
    "car, auto, automobile, machine, motorcar",
    "water",
    "painting, picture",
    "sofa, couch, lounge",
    "shelf",
    "house",
    "sea",
    "mirror",
    "rug, carpet, carpeting",
    "field",
    "armchair",
    "seat",
    "fence, fencing",
    "desk",
    "rock, stone",
    "wardrobe, closet, press",
    "lamp",
    "bathtub, bathing tub, bath, tub",
    "railing, rail",
    "cushion",
    "base, pedestal, stand",
    "box",
    "column, pillar",
    "signboard, sign",
    "chest of drawers, chest, bureau, dresser",
    "counter",
    "sand",
    "sink",
    "skyscraper",
    "fireplace, hearth, open fireplace",
    "refrigerator, icebox",
    "grandstand, covered stand",
    "path",
    "stairs, steps",
    "runway",
    "case, display case, showcase, vitrine",
    "pool table, billiard table, snooker table",
    "pillow",
    "screen door, screen",
    "stairway, staircase",
    "river",
    "bridge, span",
    "bookcase",
    "blind, screen",
    "coffee table, cocktail table",
    "toilet, can, commode, crapper, pot, potty, stool, throne",
    "flower",
    "book",
    "hill",
    "bench",
    "countertop",
    "stove, kitchen stove, range, kitchen range, cooking stove",
    "palm, palm tree",
    "kitchen island",
    "computer, computing machine, computing device, data processor, electronic computer, "
    "information processing system",
    "swivel chair",
    "boat",
    "bar",
    "arcade machine",
    "hovel, hut, hutch, shack, shanty",
    "bus, autobus, coach, charabanc, double-decker, jitney, motorbus, motorcoach, omnibus, passenger vehicle",
    "towel",
    "light, light source",
    "truck, motortruck",
    "tower",
    "chandelier, pendant, pendent",
    "awning, sunshade, sunblind",
    "streetlight, street lamp",
    "booth, cubicle, stall, kiosk",
    "television, television receiver, television set, tv, tv set, idiot box, boob tube, telly, goggle box",
    "airplane, aeroplane, plane",
    "dirt track",
    "apparel, wearing apparel, dress, clothes",
    "pole",
    "land, ground, soil",
    "bannister, banister, balustrade, balusters, handrail",
    "escalator, moving staircase, moving stairway",
    "ottoman, pouf, pouffe, puff, hassock",
    "bottle",
    "buffet, counter, sideboard",
    "poster, posting, placard, notice, bill, card",
    "stage",
    "van",
    "ship",
    "fountain",
    "conveyer belt, conveyor belt, conveyer, conveyor, transporter",
    "canopy",
    "washer, automatic washer, washing machine",
    "plaything, toy",
    "swimming pool, swimming bath, natatorium",
    "stool",
    "barrel, cask",
    "basket, handbasket",
    "waterfall, falls",
    "tent, collapsible shelter",
    "bag",
    "minibike, motorbike",
    "cradle",
    "oven",
    "ball",
    "food, solid food",
    "step, stair",
    "tank, storage tank",
    "trade name, brand name, brand, marque",
    "microwave, microwave oven",
    "pot, flowerpot",
    "animal, animate being, beast, brute, creature, fauna",
    "bicycle, bike, wheel, cycle",
    "lake",
    "dishwasher, dish washer, dishwashing machine",
    "screen, silver screen, projection screen",
    "blanket, cover",
    "sculpture",
    "hood, exhaust hood",
    "sconce",
    "vase",
    "traffic light, traffic signal, stoplight",
    "tray",
    "ashcan, trash can, garbage can, wastebin, ash bin, ash-bin, ashbin, dustbin, trash barrel, trash bin",
    "fan",
    "pier, wharf, wharfage, dock",
    "crt screen",
    "plate",
    "monitor, monitoring device",
    "bulletin board, notice board",
    "shower",
    "radiator",
    "glass, drinking glass",
    "clock",
    "flag",
)


@dataclasses.dataclass(frozen=True)
class Archive:
    """A zip file, and what tells it from a cut or wrong one."""

    url: str
    num_bytes: int
    sha256: str
    folder: str  # what it unpacks to


# Size and digest as `datasets` recorded them for its loading script of this benchmark (scene_parse_150, v2.0). The
# SHA-1 that GluonCV and others check the same file by is 219e1696abb36c8ba3a3afe7fb2f4b4606a897c7.
ADE20K_ARCHIVE = Archive(
    "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
    num_bytes=967_382_037,
    sha256="7ff1be44964418441f542a7cc1e1a650e7dc0fc275f5d23252bc9bbdbc977b29",
    folder="ADEChallengeData2016",
)


def download_ade20k(archive: Archive = ADE20K_ARCHIVE) -> Path:
    """
    Folder of the unpacked archive in the cache of `datasets`, downloaded, checked and unpacked where it is not there.

    Raises:
        `ConnectionError`: if the archive cannot be downloaded.
        `ValueError`: if what was downloaded has another size or digest. The file is removed from the cache, so that
            the next call downloads it again.
    """
    settings = DownloadConfig(
        use_etag=False,  # once downloaded, no request is made
        download_desc=f"Downloading {archive.folder}",
        # By default the client gives up after five minutes, and the benchmark is a gigabyte.
        storage_options={"http": {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=30, sock_read=60)}}},
    )
    try:
        path = Path(DownloadManager(download_config=settings).download(archive.url))
    except Exception as error:  # of the file system, the HTTP client, or the Hub's offline mode
        raise ConnectionError(
            f"{archive.url} cannot be downloaded ({type(error).__name__}: {error}): get it elsewhere, unpack it, and "
            f"pass the folder {archive.folder} as dataset_name."
        ) from error

    # A folder counts as unpacked when the last of it was written: that is noted beside the archive.
    note = path.with_name(path.name + ".unpacked")
    folder = Path(note.read_text(encoding="utf-8")) if note.is_file() else None
    if folder is None or not folder.is_dir():
        check_archive(path, archive)
        settings.force_extract = True
        folder = Path(DownloadManager(download_config=settings).extract(str(path))) / archive.folder
        note.write_text(str(folder), encoding="utf-8")
    return folder


def check_archive(path: Path, archive: Archive) -> None:
    """
    Raises:
        `ValueError`: with what was expected and found, after removing the file, if it is not the archive.
    """
    expected, found = f"{archive.num_bytes:,} bytes", f"{path.stat().st_size:,} bytes"
    if found == expected:
        with path.open("rb") as file:
            found = sha_fileobj(file).hex()
        expected = f"the SHA-256 {archive.sha256}"
        if found == archive.sha256:
            return
    path.unlink()
    raise ValueError(
        f"{archive.url}: the download {path} should have {expected} but has {found}. It has been removed; the next "
        "call downloads it again."
    )
