"""Originals sealed to a public key: whoever seals them cannot read them back.

HPKE (RFC 9180): X25519, HKDF-SHA256, ChaCha20-Poly1305, a fresh key for every
object. The pseudonym is bound in, so a sealed entry cannot be passed off as
another object's. The plain text is padded, so its length tells nothing.
"""

from __future__ import annotations

import hashlib
import json
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from memmc.dicom.read import Instance, text
from memmc.errors import IdentityKeyError

ORIGINALS: Final = (
    ("sop_instance_uid", "SOPInstanceUID"),
    ("series_uid", "SeriesInstanceUID"),
    ("study_uid", "StudyInstanceUID"),
    ("patient_id", "PatientID"),
    ("issuer_of_patient_id", "IssuerOfPatientID"),
    ("accession_number", "AccessionNumber"),
)
"""What an entry holds, and the attribute it is read from: what a result needs on its way back to the archive."""

MAX_SEALED_BYTES: Final = 4096
_MAX_VALUE = 256  # characters; the longest of these attributes may hold 64
_BLOCK = 256
_CONTEXT = b"memmc vault 1 "


def _suite() -> Suite:
    return Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


def seal_originals(instance: Instance, pseudonym: str, public_key: bytes) -> bytes:
    """Return an instance's originals, sealed.

    Args:
        instance: the parsed object.
        pseudonym: its `sop_instance_uid` in the lake.
        public_key: X25519, 32 bytes.
    """
    found = {name: (text(instance.dataset, keyword) or "")[:_MAX_VALUE] for name, keyword in ORIGINALS}
    plain = json.dumps({name: value for name, value in found.items() if value}).encode()
    padded = plain.ljust(-(-len(plain) // _BLOCK) * _BLOCK)
    return _suite().encrypt(padded, X25519PublicKey.from_public_bytes(public_key), info=_CONTEXT + pseudonym.encode())


def open_originals(sealed: bytes, pseudonym: str, private_key: X25519PrivateKey) -> dict[str, str]:
    """Undo `seal_originals`.

    Raises:
        IdentityKeyError: another key, another object's entry, or changed bytes.
    """
    try:
        return json.loads(_suite().decrypt(sealed, private_key, info=_CONTEXT + pseudonym.encode()))
    except (InvalidTag, ValueError):
        raise IdentityKeyError(
            "an entry of the vault does not open with this private key; check --private-key-file, and that the vault "
            "is the one this lake was made with"
        ) from None


def vault_key_id(public_key: bytes) -> str:
    """Return 16 hex digits that name a vault's key and may be shown."""
    return hashlib.sha256(b"memmc vault key " + public_key).hexdigest()[:16]
