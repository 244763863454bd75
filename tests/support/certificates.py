"""Directories of certificates as QEMU's `tls-creds-x509` wants them."""

from __future__ import annotations

import datetime
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

HOSTS = ("127.0.0.1", "localhost")


class Authority:
    """Makes a directory for both ends, each with a certificate of its own."""

    def __init__(self) -> None:
        self._ca = trustme.CA()

    def directory(self, path: Path, *names: str, expired: bool = False) -> Path:
        """Certificates for these hosts, this machine unless given."""
        path.mkdir()
        self._ca.cert_pem.write_to_path(path / "ca-cert.pem")
        today = datetime.datetime.now(datetime.UTC)
        for who in ("server", "client"):
            found = self._ca.issue_cert(
                *(names or HOSTS),
                common_name=who,
                not_before=today - datetime.timedelta(days=9),
                not_after=today + datetime.timedelta(days=-1 if expired else 9),
            )
            found.cert_chain_pems[0].write_to_path(path / f"{who}-cert.pem")
            found.private_key_pem.write_to_path(path / f"{who}-key.pem")
        return path

    def revoke(self, path: Path, who: str) -> None:
        """A list beside the certificates that takes one of them back."""
        certificate = x509.load_pem_x509_certificate((path / f"{who}-cert.pem").read_bytes())
        issuer = x509.load_pem_x509_certificate(self._ca.cert_pem.bytes())
        key = serialization.load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        today = datetime.datetime.now(datetime.UTC)
        entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number).revocation_date(today)
        found = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(issuer.subject)
            .last_update(today - datetime.timedelta(days=1))
            .next_update(today + datetime.timedelta(days=9))
            .add_revoked_certificate(entry.build())
            .sign(key, hashes.SHA256())  # type: ignore[arg-type]
        )
        (path / "ca-crl.pem").write_bytes(found.public_bytes(serialization.Encoding.PEM))
