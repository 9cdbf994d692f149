//! Where newlines are, for many bytes at once: a search that begins anew for each line costs as much as a short line.

pub const BLOCK: usize = 64;

/// Bit n is set where byte n is a newline.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub fn newlines(block: &[u8; BLOCK]) -> u64 {
    use std::arch::x86_64::{_mm_cmpeq_epi8, _mm_movemask_epi8, _mm_set_epi64x, _mm_set1_epi8};
    // SAFETY: as below.
    let newline = unsafe { _mm_set1_epi8(b'\n'.cast_signed()) };
    let words = block.as_chunks::<8>().0;
    let mut mask = 0;
    for (n, pair) in words.chunks_exact(2).enumerate() {
        let [low, high] = [pair[0], pair[1]].map(i64::from_le_bytes);
        // SAFETY: every processor of this architecture has these instructions, and they work on registers.
        let found = unsafe { _mm_movemask_epi8(_mm_cmpeq_epi8(_mm_set_epi64x(high, low), newline)) };
        mask |= u64::from(found.cast_unsigned()) << (16 * n);
    }
    mask
}

#[cfg(not(target_arch = "x86_64"))]
pub use portable as newlines;

/// The same in eight bytes at a time, where no wider registers are known.
#[cfg(any(test, not(target_arch = "x86_64")))]
#[inline(always)]
pub fn portable(block: &[u8; BLOCK]) -> u64 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    /// Moves the lowest bit of byte n to bit n of the highest byte.
    const GATHER: u64 = 0x0102_0408_1020_4080;
    let mut mask = 0;
    for (n, word) in block.as_chunks::<8>().0.iter().enumerate() {
        let zero_at_newline = u64::from_le_bytes(*word) ^ (u64::from_ne_bytes([b'\n'; 8]));
        // A carry into the highest bit tells that one of the lower ones is set; it never leaves its byte.
        let other = (((zero_at_newline & LOW) + LOW) | zero_at_newline) & !LOW;
        let found = (other ^ !LOW) >> 7;
        mask |= (found.wrapping_mul(GATHER) >> 56) << (8 * n);
    }
    mask
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(block: &[u8; BLOCK]) {
        let mut expected = 0;
        for (n, byte) in block.iter().enumerate() {
            expected |= u64::from(*byte == b'\n') << n;
        }
        assert_eq!(newlines(block), expected, "{block:?}");
        assert_eq!(portable(block), expected, "{block:?}");
    }

    #[test]
    fn a_newline_is_found_at_every_place_among_every_other_byte() {
        for other in 0..=255 {
            check(&[other; BLOCK]);
            for at in 0..BLOCK {
                let mut block = [other; BLOCK];
                block[at] = b'\n';
                check(&block);
                block[(at + 1) % BLOCK] = b'\n';
                check(&block);
            }
        }
    }
}
