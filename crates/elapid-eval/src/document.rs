//! What is evaluated: documents of tokens, and how many bytes and words of text they stand for.

use std::ops::Range;

/// The tokens of a document.
#[derive(Debug, Clone, Copy)]
pub enum Tokens<'a> {
    /// Every byte is a token; a mapped file is read as it is needed.
    Bytes(&'a [u8]),
    /// What a tokenizer made of the text.
    Ids(&'a [u32]),
}

impl Tokens<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Ids(ids) => ids.len(),
        }
    }

    fn append(&self, range: Range<usize>, ids: &mut Vec<u32>) {
        match self {
            Self::Bytes(bytes) => ids.extend(bytes[range].iter().map(|&byte| u32::from(byte))),
            Self::Ids(all) => ids.extend_from_slice(&all[range]),
        }
    }
}

/// A text that is predicted by itself.
#[derive(Debug, Clone, Copy)]
pub struct Document<'a> {
    /// Its tokens.
    pub tokens: Tokens<'a>,
    /// A token that is put before them, so that the first one is predicted too. Without one, the first token is
    /// read only.
    pub start: Option<u32>,
    /// Bytes of its text; 0 if the tokens stand for no text.
    pub bytes: u64,
    /// Words of its text, see [`words`].
    pub words: u64,
}

impl<'a> Document<'a> {
    /// A text of bytes that are tokens.
    pub fn bytes(text: &'a [u8]) -> Self {
        Self {
            tokens: Tokens::Bytes(text),
            start: None,
            bytes: text.len() as u64,
            words: words(text),
        }
    }

    /// What a tokenizer made of `text`.
    pub fn ids(ids: &'a [u32], text: &[u8]) -> Self {
        Self { tokens: Tokens::Ids(ids), start: None, bytes: text.len() as u64, words: words(text) }
    }

    /// The same with a token before the first one.
    pub fn after(self, start: Option<u32>) -> Self {
        Self { start, ..self }
    }

    /// Tokens of the text.
    pub(crate) fn own(&self) -> usize {
        self.tokens.len()
    }

    /// Tokens, the one before the text included.
    pub(crate) fn len(&self) -> usize {
        self.own() + usize::from(self.start.is_some())
    }

    /// Appends the tokens at these places of [`Document::len`].
    pub(crate) fn append(&self, range: Range<usize>, ids: &mut Vec<u32>) {
        let Some(start) = self.start else {
            return self.tokens.append(range, ids);
        };
        if range.start == 0 && range.end > 0 {
            ids.push(start);
        }
        self.tokens.append(range.start.saturating_sub(1)..range.end.saturating_sub(1), ids);
    }
}

/// Words as `wc -w` counts them in the C locale: stretches of bytes without space, tab, line feed, vertical tab,
/// form feed or carriage return.
pub fn words(text: &[u8]) -> u64 {
    let space = |byte: u8| byte == b' ' || (b'\t'..=b'\r').contains(&byte);
    let mut inside = false;
    text.iter().fold(0, |count, &byte| {
        let begins = !inside && !space(byte);
        inside = !space(byte);
        count + u64::from(begins)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_wc() {
        assert_eq!(words(b""), 0);
        assert_eq!(words(b" \t\n\x0b\x0c\r "), 0);
        assert_eq!(words(b"one"), 1);
        assert_eq!(words(b" one  two\x0bthree\n"), 3);
        assert_eq!(words("naïve café\u{a0}x".as_bytes()), 2);
    }

    #[test]
    fn the_token_before_the_text_comes_first() {
        let read = |document: &Document<'_>, range| {
            let mut ids = Vec::new();
            document.append(range, &mut ids);
            ids
        };
        let plain = Document::bytes(b"abc");
        assert_eq!((plain.len(), read(&plain, 1..3)), (3, vec![98, 99]));
        let with = Document::ids(&[7, 8, 9], b"abc").after(Some(1));
        assert_eq!((with.len(), with.own()), (4, 3));
        assert_eq!(read(&with, 0..4), [1, 7, 8, 9]);
        assert_eq!(read(&with, 0..1), [1]);
        assert_eq!(read(&with, 2..4), [8, 9]);
        assert!(read(&with, 0..0).is_empty());
    }
}
