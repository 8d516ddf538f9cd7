//! The alphabet of byte-level vocabularies: each byte as one printable character. Printable Latin-1 stands
//! for itself; the 68 others are U+0100 and up, in order (GPT-2).

/// True for bytes that stand for themselves.
const fn is_printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The byte of each character up to U+0143, or none.
const BYTES: [Option<u8>; 256 + 68] = {
    let mut table = [None; 256 + 68];
    let (mut byte, mut next) = (0, 256);
    while byte < 256 {
        if is_printable(byte as u8) {
            table[byte] = Some(byte as u8);
        } else {
            table[next] = Some(byte as u8);
            next += 1;
        }
        byte += 1;
    }
    table
};

/// Appends the bytes that a token stands for. A token with any character outside of the alphabet (an added
/// one) stands for its own text.
pub(super) fn append(token: &str, bytes: &mut Vec<u8>) {
    let before = bytes.len();
    for character in token.chars() {
        match BYTES.get(character as usize).copied().flatten() {
            Some(byte) => bytes.push(byte),
            None => {
                bytes.truncate(before);
                bytes.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_character() {
        let mut seen: Vec<u8> = BYTES.iter().flatten().copied().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
    }

    #[test]
    fn known_characters() {
        let mut bytes = Vec::new();
        append("ĠHelloĊ", &mut bytes);
        append("Ã©", &mut bytes);
        append("a b", &mut bytes);
        append("ł", &mut bytes);
        assert_eq!(bytes, [&b" Hello\n"[..], "é".as_bytes(), b"a b", &[0xA0]].concat());
    }
}
