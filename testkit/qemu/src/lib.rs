//! Real QEMU for the tests: a guest of our own, and the harness around it.
