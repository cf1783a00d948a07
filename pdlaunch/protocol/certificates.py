"""Makes the certificate of a launch, for HTTPS between its hosts, and reads the operator's
certificate, for clients of the router.

The certificate of a launch is PEM text with its private key; all its processes hold it. Clients
trust only this certificate and check no host name. Servers identify clients by the launch's token.
"""

import datetime
import os
import ssl
from pathlib import Path
from typing import NamedTuple

from pdlaunch.errors import ConfigError

_NAME = "pdlaunch"


def new_certificate() -> str:
    """Return a new certificate for one launch."""
    # Imported here: launches on one host need no certificate.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks of hosts differ
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private_key = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return (certificate.public_bytes(pem) + private_key).decode()


def server_context(certificate: str) -> ssl.SSLContext:
    """Return the TLS context for a server of the launch."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Python's ssl reads keys only from files. This file is in memory; closing it removes it.
    descriptor = os.memfd_create(_NAME)
    try:
        os.write(descriptor, certificate.encode())
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    return context


def client_context(certificate: str) -> ssl.SSLContext:
    """Return the TLS context for clients of the launch's servers, which prove to hold its key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.load_verify_locations(cadata=certificate)
    return context


class CertificateFiles(NamedTuple):
    """Paths of a router's certificate; ``keyfile`` is None if ``certfile`` holds the key too."""

    certfile: str
    keyfile: str | None

    @classmethod
    def given(cls, certfile: str | None, keyfile: str | None) -> "CertificateFiles | None":
        return None if certfile is None else cls(certfile, keyfile)

    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["http/1.1"])
        self.load(context)
        return context

    def load(self, context: ssl.SSLContext) -> None:
        """Load the present files into ``context``, for new connections. Raises ConfigError."""
        try:
            # Read first: OpenSSL does not say which file cannot be read.
            _ = [Path(file).read_bytes() for file in self if file]
            context.load_cert_chain(self.certfile, self.keyfile, password=_no_password)
        except (OSError, ValueError) as error:
            text = str(error)
            if isinstance(error, ssl.SSLError):
                is_other = "MISMATCH" in text
                text = "another private key" if is_other else "no PEM certificate, or no key"
                text = f"{text} is in {' and '.join(filter(None, self))}"
            elif isinstance(error, OSError):
                text = f"{error.filename} cannot be read: {error.strerror}"
            fix = "name PEM files: the chain, and its private key without a password"
            raise ConfigError(text, field="ssl_certfile", value=self.certfile, fix=fix) from None

    def contents(self) -> list[bytes] | None:
        try:
            return [Path(file).read_bytes() for file in self if file]
        except OSError:
            return None


def _no_password() -> str:
    raise ValueError("the private key has a password")
