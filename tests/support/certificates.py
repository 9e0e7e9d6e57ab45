"""Throw-away certificates, made with the openssl command."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

OPENSSL = shutil.which("openssl")

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
_AUTHORITY = (
    *("-addext", "basicConstraints=critical,CA:TRUE"),
    *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
)


class Authority:
    """A certificate authority that knows its own: ``ca.pem`` and whatever it issues are in one folder."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.certificate = folder / "ca.pem"
        self._key = folder / "ca.key"
        openssl(
            *("req", "-x509", *_NEW_KEY, "-keyout", self._key, "-out", self.certificate),
            *("-days", "1", "-subj", f"/CN={name}", *_AUTHORITY),
        )

    def issue(self, name: str, alternatives: str = "") -> tuple[Path, Path]:
        """Return a new certificate and its key, both as PEM."""
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        request, extensions = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        names = f"subjectAltName={alternatives}\n" if alternatives else ""
        extensions.write_text(f"{names}basicConstraints=CA:FALSE\nauthorityKeyIdentifier=keyid\n")
        openssl("req", *_NEW_KEY, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        openssl(
            *("x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial"),
            *("-out", certificate, "-days", "1", "-extfile", extensions),
        )
        return certificate, key


def openssl(*arguments: str | Path) -> None:
    """Run the command; it must succeed."""
    assert OPENSSL is not None
    subprocess.run([OPENSSL, *arguments], check=True, capture_output=True)
