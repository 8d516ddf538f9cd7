//! From the bytes of tokens to text that can be shown at once: characters are never broken, and stop
//! strings are found across token borders and never shown.
//!
//! Bytes pass through [`StopStrings`] first and [`Utf8Stream`] second. Both hold back what they cannot yet
//! decide on, and what they give does not depend on how the bytes were divided among calls.

use elapid_formats::Tokenizer;
use elapid_formats::tokenizer::Detokenizer;
use elapid_models::MambaConfig;

use crate::{Error, Options, Result};

/// Bytes to text: an incomplete character waits for its rest; bytes that cannot be part of one become
/// U+FFFD as soon as that is clear.
#[derive(Debug, Clone, Default)]
pub struct Utf8Stream {
    /// The beginning of a character, at most three bytes.
    tail: Vec<u8>,
}

impl Utf8Stream {
    /// The text that `bytes` complete.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.tail.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = self.tail.as_slice();
        let keep = loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    break 0;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    match error.error_len() {
                        None => break after.len(),
                        Some(invalid) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &after[invalid..];
                        }
                    }
                }
            }
        };
        self.tail.drain(..self.tail.len() - keep);
        text
    }

    /// The end of the stream: a character that was never completed becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.tail)).into_owned()
    }
}

/// Finds the first of several strings in a stream of bytes.
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    stops: Vec<Vec<u8>>,
    /// Bytes that may be the beginning of a stop string.
    held: Vec<u8>,
}

impl StopStrings {
    /// A search for `stops`.
    ///
    /// # Errors
    /// If one of them is empty.
    pub fn new<S: AsRef<[u8]>>(stops: &[S]) -> Result<Self> {
        let stops: Vec<Vec<u8>> = stops.iter().map(|stop| stop.as_ref().to_vec()).collect();
        if stops.iter().any(Vec::is_empty) {
            return Err(Error::Option {
                name: "stop",
                expected: "a string that is not empty",
                found: "\"\"".into(),
            });
        }
        Ok(Self { stops, held: Vec::new() })
    }

    /// Appends to `clear` what certainly stands before any stop string. True once one is complete; it and
    /// what follows it are dropped.
    pub fn push(&mut self, bytes: &[u8], clear: &mut Vec<u8>) -> bool {
        for &byte in bytes {
            self.held.push(byte);
            // Of those that end here, the longest hides most.
            let complete = self.stops.iter().filter(|stop| self.held.ends_with(stop));
            if let Some(length) = complete.map(Vec::len).max() {
                clear.extend_from_slice(&self.held[..self.held.len() - length]);
                self.held.clear();
                return true;
            }
            let begins = |rest: &[u8]| self.stops.iter().any(|stop| stop.starts_with(rest));
            let sure = (0..=self.held.len())
                .find(|&from| begins(&self.held[from..]))
                .unwrap_or(self.held.len());
            clear.extend(self.held.drain(..sure));
        }
        false
    }

    /// The end of the stream: appends what was held back.
    pub fn finish(&mut self, clear: &mut Vec<u8>) {
        clear.append(&mut self.held);
    }
}

/// Bytes to text up to a stop string.
#[derive(Debug, Clone, Default)]
pub struct TextStream {
    stops: StopStrings,
    utf8: Utf8Stream,
}

impl TextStream {
    /// A stream that ends at the first of `stops`.
    ///
    /// # Errors
    /// If one of them is empty.
    pub fn new<S: AsRef<[u8]>>(stops: &[S]) -> Result<Self> {
        Ok(Self { stops: StopStrings::new(stops)?, utf8: Utf8Stream::default() })
    }

    /// The text that may be shown now, and whether a stop string is complete.
    pub fn push(&mut self, bytes: &[u8]) -> (String, bool) {
        let mut clear = Vec::new();
        let stopped = self.stops.push(bytes, &mut clear);
        (self.utf8.push(&clear), stopped)
    }

    /// The end of the stream: all that was held back.
    pub fn finish(&mut self) -> String {
        let mut clear = Vec::new();
        self.stops.finish(&mut clear);
        self.utf8.push(&clear) + &self.utf8.finish()
    }
}

/// Tokens to text up to a stop string.
#[derive(Debug, Clone)]
pub(crate) struct TokenText {
    /// None if tokens give no text, and at the end.
    detokenizer: Option<Detokenizer>,
    stream: TextStream,
}

impl TokenText {
    /// The text of the tokens of a model that follow `before`.
    ///
    /// # Errors
    /// If a stop string is empty, or there are some but tokens give no text.
    pub fn new(options: &Options, config: &MambaConfig, before: &[u32]) -> Result<Self> {
        let bytes = config.vocab_size == 256;
        let tokenizer = options.tokenizer.clone().or(bytes.then(Tokenizer::bytes));
        if !options.stop.is_empty() && tokenizer.is_none() {
            return Err(Error::Option {
                name: "stop",
                expected: "none, as without a tokenizer there is no text",
                found: format!("{:?} for {} tokens", options.stop, config.vocab_size),
            });
        }
        let detokenizer = tokenizer.map(|tokenizer| tokenizer.detokenizer(before));
        Ok(Self { detokenizer, stream: TextStream::new(&options.stop)? })
    }

    /// The text that may be shown now, and whether a stop string is complete.
    pub fn push(&mut self, token: u32) -> (String, bool) {
        let mut bytes = Vec::new();
        if let Some(detokenizer) = &mut self.detokenizer {
            detokenizer.push(token, &mut bytes);
        }
        self.stream.push(&bytes)
    }

    /// The end of the text: all that was held back. After a stop string nothing follows.
    pub fn finish(&mut self, stopped: bool) -> String {
        let mut bytes = Vec::new();
        if let Some(detokenizer) = self.detokenizer.take().as_mut().filter(|_| !stopped) {
            detokenizer.finish(&mut bytes);
        }
        self.stream.push(&bytes).0 + &self.stream.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn characters_appear_when_they_are_complete() {
        let mut stream = Utf8Stream::default();
        let shown: Vec<String> = "aé€🐍".bytes().map(|byte| stream.push(&[byte])).collect();
        assert_eq!(shown, ["a", "", "é", "", "", "€", "", "", "", "🐍"]);
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn invalid_bytes_are_replaced_once_that_is_clear() {
        let mut stream = Utf8Stream::default();
        assert_eq!(stream.push(&[0xFF]), "\u{FFFD}");
        assert_eq!(stream.push(&[0xE2, 0x82]), "");
        assert_eq!(stream.push(b"x"), "\u{FFFD}x");
        assert_eq!(stream.push(&[0xF0, 0x9F]), "");
        assert_eq!(stream.finish(), "\u{FFFD}");
    }

    #[test]
    fn a_possible_stop_string_is_held_back() {
        let mut stream = TextStream::new(&["END", "\n\n"]).unwrap();
        assert_eq!(stream.push(b"some E"), ("some ".into(), false));
        assert_eq!(stream.push(b"N"), (String::new(), false));
        assert_eq!(stream.push(b"E"), ("EN".into(), false));
        assert_eq!(stream.push(b"ND of"), (String::new(), true));
        let mut stream = TextStream::new(&["END", "\n\n"]).unwrap();
        assert_eq!(stream.push(b"a\nb\n"), ("a\nb".into(), false));
        assert_eq!(stream.finish(), "\n");
    }

    #[test]
    fn a_stop_string_may_overlap_its_own_beginning() {
        let mut stream = TextStream::new(&["aab"]).unwrap();
        assert_eq!(stream.push(b"aaab"), ("a".into(), true));
        assert!(TextStream::new(&["x", ""]).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_division_into_tokens_does_not_matter(
            bytes in prop::collection::vec(prop_oneof![97u8..100, any::<u8>()], 0..80),
            cut in 1usize..7,
        ) {
            let stops = ["ab", "bca", "cc"];
            let read = |size: usize| {
                let mut stream = TextStream::new(&stops).unwrap();
                let mut text = String::new();
                for part in bytes.chunks(size) {
                    let (shown, stopped) = stream.push(part);
                    text += &shown;
                    if stopped {
                        return text + &stream.finish();
                    }
                }
                text + &stream.finish()
            };
            // The definition: everything before the stop string that ends first.
            let end = (0..=bytes.len())
                .find_map(|end| {
                    let longest = stops.iter().filter(|s| bytes[..end].ends_with(s.as_bytes()));
                    longest.map(|s| s.len()).max().map(|len| end - len)
                })
                .unwrap_or(bytes.len());
            let expected = String::from_utf8_lossy(&bytes[..end]);
            prop_assert_eq!(&read(cut), &expected);
            prop_assert_eq!(&read(1), &expected);
        }
    }
}
