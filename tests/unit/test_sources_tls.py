"""An archive behind TLS: trusted with its own authority, refused by name where its certificate is not to be trusted."""

from __future__ import annotations

import ipaddress
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from small_archive import Orthanc, Site, name, served

from memmc.config import SourceConfig
from memmc.errors import StorageError
from memmc.sources import http
from memmc.sources.objects import FetchFailed, SourceObject
from memmc.sources.open import open_source

NOW = datetime.now(UTC)
LOOPBACK = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))


class Authority:
    """A certificate authority with a file of its own certificate."""

    def __init__(self, folder: Path) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named("test authority")
        self._folder = folder
        folder.mkdir()
        own = self._builder(self._name, self._key, NOW + timedelta(days=1))
        own = own.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.file = folder / "ca.pem"
        self.file.write_bytes(own.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def server(self, host: x509.GeneralName, ends: datetime) -> ssl.SSLContext:
        """Return what a server of this host needs, with a certificate that ends at a time."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(_named("archive"), key, ends)
        builder = builder.add_extension(x509.SubjectAlternativeName([host]), critical=False)
        chain = self._folder / "server.pem"
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        chain.write_bytes(private + builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        return context

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, ends: datetime) -> x509.CertificateBuilder:
        begins = min(NOW, ends) - timedelta(days=2)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(ends)
        )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


@pytest.fixture
def archive(monkeypatch) -> Orthanc:
    monkeypatch.setattr(http, "RETRY_DELAYS_S", (0.0, 0.0))
    archive = Orthanc()
    archive.receive(0, b"instance 0")
    archive.wait(61)
    return archive


def source(site: Site, ca_file: Path | None):
    return open_source(f"orthanc+{site.url}", SourceConfig(ca_file=str(ca_file) if ca_file else None), {})


def test_an_authority_of_the_hospitals_own_is_trusted(archive, tmp_path):
    ours = Authority(tmp_path / "ours")
    with served(Site(archive.routes), ours.server(LOOPBACK, NOW + timedelta(days=1))) as site:
        place = source(site, ours.file)
        assert site.url.startswith("https://")
        (item,) = place.listing(None, lambda _: True).objects
        assert place.fetch(item, 1 << 20) == b"instance 0"


@pytest.mark.parametrize("wrong", ["authority", "host", "date", "system"])
def test_a_certificate_that_is_not_to_be_trusted_is_named(archive, tmp_path, wrong):
    ours, others = Authority(tmp_path / "ours"), Authority(tmp_path / "others")
    host = x509.DNSName("archive.example") if wrong == "host" else LOOPBACK
    ends = NOW - timedelta(hours=1) if wrong == "date" else NOW + timedelta(days=1)
    trusted = {"authority": others.file, "system": None}.get(wrong, ours.file)
    with served(Site(archive.routes), ours.server(host, ends)) as site:
        place = source(site, trusted)
        with pytest.raises(StorageError, match=r"STORE_TLS.*source\.ca_file") as caught:
            place.listing(None, lambda _: True)
        assert "127.0.0.1" not in str(caught.value) and "archive" not in str(caught.value)
        with pytest.raises(FetchFailed) as refused:
            place.fetch(SourceObject(name("instances", 0), site.url, 10, "x"), 1 << 20)
        assert refused.value.reason == "STORE_TLS" and refused.value.retriable
        assert not site.asked
