"""Passwords, tokens and signatures in texts: what may be shown of an address, a message, or the value of a variable.

A secret in an address would end up wherever the address does: in files of a run and of its checkpoints, in job scripts,
in MLflow, on consoles. Standard library only.
"""

import re
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

HIDDEN = "***"
_NETRC = "user and password of a web server are read from ~/.netrc, or from the file that the variable NETRC names"
CREDENTIALS = {
    "http": _NETRC,
    "https": _NETRC,
    "s3": "keys of S3 are read from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws",
    "gs": "credentials of Google are read from the file that GOOGLE_APPLICATION_CREDENTIALS names, or from gcloud's",
}
"""Where secrets are taken from, for people who have written one into a URI."""
SECRET = re.compile(
    r"(password|passwd|passphrase|pwd|token|secret|signature|sig|credentials?|auth|authorization|"
    r"(api|access|account|secret|private|shared|encryption)[-_]?key|^key)$",
    re.IGNORECASE,
)
"""How names of an address's parameters end whose values are secrets, those of presigned ones included."""
SECRET_VARIABLE = re.compile(
    r"PASSW|PASSPHRASE|TOKEN|SECRET|CREDENTIAL|COOKIE|SIGNATURE|(^|_)(PWD|PASS|AUTH|PAT|DSN|SAS|JWT|PRIVATE)(_|$)|"
    r"(API|ACCESS|ACCOUNT|ENCRYPTION|SIGNING|LICENSE)_?KEY|(^|_)KEY$",
    re.IGNORECASE,
)
"""What names of variables have in them whose values are secrets."""
HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")
"""Of a URI, with its port; an address of IPv6 is in brackets."""
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>`]+")
_PARAMETER = re.compile(r"(?<=[?&])([^=&\s'\"<>]+)=([^&\s'\"<>)]+)")
_ASSIGNMENT = re.compile(r"\b([A-Za-z_][A-Za-z0-9_]*)=('[^']*'|\"[^\"]*\"|[^\s;&|]+)")


def shown(text: str) -> str:
    """Returns a text, such as a message of a library, without the secrets of the addresses in it."""

    def parameter(found: re.Match[str]) -> str:
        return f"{found[1]}={HIDDEN}" if SECRET.search(found[1]) else found[0]

    def address(found: re.Match[str]) -> str:
        body = found[0].rstrip(".,;:)]")
        return without_secrets(body) + found[0][len(body) :]

    return _PARAMETER.sub(parameter, _ADDRESS.sub(address, text))


def error_text(error: BaseException) -> str:
    """Returns an error's type and message without secrets, so that files and consoles may have it."""
    return shown(f"{type(error).__name__}: {error}")


def shown_script(text: str) -> str:
    """Returns shell code without the values of variables that are secrets by name, and without those in addresses."""

    def assignment(found: re.Match[str]) -> str:
        return f"{found[1]}={HIDDEN}" if SECRET_VARIABLE.search(found[1]) else found[0]

    return shown(_ASSIGNMENT.sub(assignment, text))


def is_secret(variable: str, value: str) -> bool:
    """Tells whether a variable of the environment holds a secret, by its name or by an address in its value."""
    return bool(SECRET_VARIABLE.search(variable)) or shown(value) != value


def without_secrets(text: str) -> str:
    """Returns a URI without the user and password of a web server, the password of a database, and secret parameters.

    What has none, or is no URI, comes back as it is.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or scheme.partition("+")[0] in ("sqlite", "file"):
        return text
    place, slash, path = rest.partition("/")
    if "@" in rest and "@" not in place and not HOST.fullmatch(place):
        place, slash, path = rest, "", ""  # a password with a slash in it: what looks like a port is none
    user, _, host = place.rpartition("@")
    if scheme in ("http", "https") or user.startswith(":"):
        user = ""
    user = user.partition(":")[0]
    return _without_secret_parameters(f"{scheme}://{user}{'@' if user else ''}{host}{slash}{path}")


def _without_secret_parameters(uri: str) -> str:
    try:
        parts = urlsplit(uri)
    except ValueError:  # an address that no client can read either
        return uri
    given = parse_qsl(parts.query, keep_blank_values=True)
    kept = [(name, value) for name, value in given if not SECRET.search(name)]
    return uri if kept == given else urlunsplit(parts._replace(query=urlencode(kept)))
