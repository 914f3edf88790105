"""Who a site is to other sites: its kit's key and certificate, whoever relays what it says."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedpref.errors import UserError

SITE_ORGANISATION = "site_"  # begins the organisation of sites' certificates
ROOT, CERTIFICATE, PRIVATE = "rootCA.pem", "client.crt", "client.key"


class KitIdentity:
    """A site by its kit.

    Args:
        startup: The kit's folder with its key, its certificate and the root's.

    Raises:
        UserError: The folder is none of a site's.
    """

    def __init__(self, startup: Path) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            self._root = x509.load_pem_x509_certificate((startup / ROOT).read_bytes())
            self.certificate = (startup / CERTIFICATE).read_text(encoding="utf-8")
            self._key: Any = load_pem_private_key((startup / PRIVATE).read_bytes(), None)
        except (OSError, ValueError) as error:
            raise UserError(f"{startup}: the kit's key or certificate: {error}") from error

    def sign(self, content: bytes) -> bytes:
        """Return the signature of the kit's key."""
        return bytes(self._key.sign(content, *_scheme()))

    def verify(self, site: str, content: bytes, signature: bytes, certificate: str) -> bool:
        """Return whether a site of the federation has signed this, by the root's word."""
        from cryptography import x509
        from cryptography.exceptions import InvalidSignature
        from cryptography.x509.oid import NameOID

        try:
            theirs = x509.load_pem_x509_certificate(certificate.encode())
            theirs.verify_directly_issued_by(self._root)
            names = theirs.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            # the server and who submits have certificates of the same root, and are no sites
            roles = theirs.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
            if not all(str(one.value).startswith(SITE_ORGANISATION) for one in roles) or not roles:
                return False
            now = datetime.now(UTC)
            if not theirs.not_valid_before_utc <= now <= theirs.not_valid_after_utc:
                return False
            if [name.value for name in names] != [site]:
                return False
            key: Any = theirs.public_key()
            key.verify(signature, content, *_scheme())
        except (InvalidSignature, ValueError, TypeError, AttributeError):
            return False
        return True


def _scheme() -> tuple[Any, Any]:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    digest = hashes.SHA256()
    return padding.PSS(padding.MGF1(digest), padding.PSS.DIGEST_LENGTH), digest
