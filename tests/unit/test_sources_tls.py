"""An archive behind TLS: trusted with its own authority, refused by name where its certificate is not to be trusted."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from small_archive import Orthanc, Site, name, served
from small_authority import LOOPBACK, NOW, Authority

from memmc.config import SourceConfig
from memmc.errors import StorageError
from memmc.sources import http
from memmc.sources.objects import FetchFailed, SourceObject
from memmc.sources.open import open_source


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
