"""Training, as an application of the library. Its rooms are filled by later work; see BUILD_NOTES.md."""
