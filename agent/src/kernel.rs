//! (to come)

pub mod nft;
