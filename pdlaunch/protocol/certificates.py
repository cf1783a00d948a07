"""Makes the certificate of a launch, with which engines on other hosts are reached over HTTP.

All processes of the launch hold certificate and key, which travel as its other keys do. Who calls
an engine trusts this one certificate and no authority, so any name and address will do; who is
called asks for the launch's token.
"""

from __future__ import annotations

import datetime
import os
import ssl

import msgspec

_NAME = "pdlaunch"
_VALID = datetime.timedelta(days=3650)
_CLOCK_DIFFERENCE = datetime.timedelta(days=1)
"""Clocks of hosts may be set differently."""


class LaunchCertificate(msgspec.Struct, frozen=True):
    """Holds a certificate that is its own authority, and its private key, in PEM."""

    certificate: str
    private_key: str

    def __repr__(self) -> str:
        return "LaunchCertificate(...)"


def new_certificate() -> LaunchCertificate:
    """Return a fresh certificate for one launch."""
    # Imported here: launches on one host do without.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - _CLOCK_DIFFERENCE)
        .not_valid_after(now + _VALID)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(_NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private_key = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return LaunchCertificate(
        certificate.public_bytes(serialization.Encoding.PEM).decode(), private_key.decode()
    )


def server_context(pair: LaunchCertificate) -> ssl.SSLContext:
    """Return what a server of the launch speaks TLS with."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Python reads keys from files alone: this one is in memory, and gone when it is closed.
    descriptor = os.memfd_create(_NAME)
    try:
        os.write(descriptor, f"{pair.certificate}{pair.private_key}".encode())
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    return context


def client_context(certificate: str) -> ssl.SSLContext:
    """Return what servers of the launch are called with: they prove that they hold its key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.load_verify_locations(cadata=certificate)
    return context
