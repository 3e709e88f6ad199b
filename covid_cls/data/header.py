"""What a DICOM file says of itself in words: which kind of picture it holds, and the tags that a user asks for by name.

Apart from `dicom.py`, whose code decides the pixels and so the identity of every store. A tag that nobody asked for is
never parsed, and a value that cannot be read is left out without a word, since pydicom's words may quote it.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path

from covid_cls.errors import InputError, listed

REASONS = {
    "lateral_view": "its DICOM header says that it is a lateral or oblique view (ViewPosition)",
    "not_a_chest_radiograph": "its DICOM header names another modality or body part (Modality, BodyPartExamined)",
}
_KIND = ("Modality", "BodyPartExamined", "ViewPosition")
_RADIOGRAPHS = {
    "",
    "CR",
    "DX",
    "DR",
    "RG",
    "XR",
    "RF",
    "SC",
    "OT",
    "DF",
    "HC",
}  # the last four: scans of films and screens
_CHEST = ("CHEST", "THORA", "TORA", "LUNG", "PULM", "POUMON", "POITRINE", "PECHO", "BRUST")
_SIDEWAYS = {"LL", "RL", "LATERAL", "LAT", "LLO", "RLO", "LAO", "RAO", "LPO", "RPO", "OBLIQUE", "SWIMMERS"}
_NO_TEXT = ("SQ", "OB", "OD", "OF", "OL", "OV", "OW", "UN")


def check_tags(names: Sequence[str]) -> None:
    """InputError where a name is no keyword of DICOM's dictionary, or names something that is no text."""
    from pydicom.datadict import dictionary_VR, keyword_dict, tag_for_keyword  # not imported for a set of PNG files

    for name in names:
        tag = tag_for_keyword(name)
        if tag is None:
            near = difflib.get_close_matches(name, keyword_dict, 3)
            hint = f"; meant may be {listed(near)}" if near else ""
            raise InputError(f"dicom_tags: {name} is no DICOM keyword such as PatientID or StudyDate{hint}")
        if any(kind in _NO_TEXT for kind in dictionary_VR(tag).split(" or ")):
            raise InputError(f"dicom_tags: {name} holds no text; leave it out")


def read_header(path: Path, names: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """Codes of `REASONS` for why a readable file is no frontal chest radiograph, and the text of the tags `names`.

    No code and no tag where it is no DICOM file. A tag that is absent or damaged is "".
    """
    with path.open("rb") as file:
        head = file.read(132)
    if head[128:] != b"DICM" and path.suffix.lower() not in (".dcm", ".dicom"):
        return [], {}
    words = _texts(path, (*_KIND, *names))
    modality, part, view = (words[name].strip().upper() for name in _KIND)
    codes = []
    if (
        set(view.replace("_", " ").split()) & _SIDEWAYS and "DECUB" not in view
    ):  # lying on a side is a frontal view, too
        codes.append("lateral_view")
    elsewhere = part.isascii() and part and not any(word in part for word in _CHEST)  # other scripts are not judged
    if modality not in _RADIOGRAPHS or elsewhere:
        codes.append("not_a_chest_radiograph")
    return codes, {name: words[name] for name in names}


def _texts(path: Path, names: Sequence[str]) -> dict[str, str]:
    """The values of these tags as text; several of one tag are joined by DICOM's backslash."""
    from pydicom import dcmread
    from pydicom.multival import MultiValue

    import covid_cls.data.dicom  # noqa: F401 - keeps what pydicom says of damaged values out of log and console

    found = dict.fromkeys(names, "")
    try:
        header = dcmread(path, force=True, stop_before_pixels=True, specific_tags=list(names))
    except Exception:  # damaged values draw any type of exception from pydicom
        return found
    for name in names:
        try:
            value = header.get(name)
            found[name] = "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value or "")
        except Exception:  # noqa: S112 - the tag is damaged, and left empty
            continue
    return found
