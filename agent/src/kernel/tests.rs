//! Tests over the real kernel, each in network namespaces that it makes itself. They need root.

mod netns;
mod support;
