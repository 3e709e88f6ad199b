"""DICOM radiographs in memory, with known pixels."""

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

SECRET = "SECRET^NAME"
RAMP = np.linspace(0, 4095, 48 * 64).round().astype(np.uint16).reshape(48, 64)
RAMP8 = (RAMP // 16).astype(np.uint8)


def radiograph(pixels: np.ndarray = RAMP, bits: int = 12, **tags: object) -> Dataset:
    """Return a radiograph with `pixels` as stored values, including data that identifies a patient.

    Args:
        pixels: Stored values, shape (height, width), or (height, width, 3) for RGB.
        bits: Bits stored per value.
        tags: DICOM attributes to add or to replace.
    """
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.1.1")
    image.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    image.SOPClassUID, image.SOPInstanceUID = UID("1.2.840.10008.5.1.4.1.1.1.1"), UID("1.2.3")
    image.PatientName, image.PatientID, image.PatientBirthDate = SECRET, SECRET, "19500101"
    image.add_new(0x00091010, "LO", SECRET)
    image.Rows, image.Columns = pixels.shape[:2]
    image.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    image.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        image.PlanarConfiguration = 0
    image.BitsAllocated, image.BitsStored, image.HighBit = pixels.dtype.itemsize * 8, bits, bits - 1
    image.PixelRepresentation = int(pixels.dtype.kind == "i")
    image.PixelData = pixels.tobytes()
    image["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    for tag, value in tags.items():
        setattr(image, tag, value)
    return image


def spread(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return the grey levels, 0 to 255, of a linear window from `low` to `high`."""
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)
