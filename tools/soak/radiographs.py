"""A DICOM radiograph in memory whose pixels are known."""

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

SECRET = "SECRET^NAME"
RAMP = np.linspace(0, 4095, 48 * 64).round().astype(np.uint16).reshape(48, 64)
RAMP8 = (RAMP // 16).astype(np.uint8)


def radiograph(pixels: np.ndarray = RAMP, bits: int = 12, **tags: object) -> Dataset:
    """A MONOCHROME2 radiograph of `pixels` as stored, with a patient in it; `tags` are added or replace."""
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
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)
