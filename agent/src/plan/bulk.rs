//! When entries are handled in bulk instead of one by one.

use std::collections::BTreeMap;

/// Number of entries above which they are handled in bulk: the entries of 256 peers.
pub const BULK_THRESHOLD: usize = 1024;

/// Whether to merge and compare this many entries in bulk: more than [`BULK_THRESHOLD`], and more than a quarter of those
/// present.
pub fn is_bulk(present: usize, entries: usize) -> bool {
    entries > BULK_THRESHOLD && entries > present / 4
}

/// Inserts entries into a map; the last entry of a key wins. Building a tree from sorted entries is faster than inserting them
/// one by one, and fills its nodes, so it takes half the memory.
pub fn merge<K: Ord, V>(map: &mut BTreeMap<K, V>, entries: Vec<(K, V)>) {
    if map.is_empty() {
        *map = entries.into_iter().collect();
    } else if is_bulk(map.len(), entries.len()) {
        map.append(&mut entries.into_iter().collect());
    } else {
        map.extend(entries);
    }
}
