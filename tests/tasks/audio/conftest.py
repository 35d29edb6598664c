"""What tests of audio share: a reason where soundfile cannot be imported."""

import pytest


@pytest.fixture(scope="session")
def soundfile():
    """The package, or a skip: it is there, but not whole, where cffi or libsndfile are missing."""
    try:
        import soundfile
    except (ImportError, OSError) as error:
        pytest.skip(f"soundfile cannot be imported: {error}")
    return soundfile
