//! Decoding one token at a time. What comes out is bytes: of byte-level vocabularies exactly those of the
//! token, so that a character may be divided among tokens, and `elapid-infer`'s text stream puts it
//! together; of all others, whose decoders look at neighbours too, whole characters.

use super::{Kind, Subwords, Tokenizer, bytes};

/// A character has at most four bytes, hence four tokens; what is unreadable for longer than this stays so.
const WAIT: usize = 8;

/// Turns tokens into the bytes of their text.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    /// Tokens that the decoder must see together: some that are done, and those that wait.
    window: Vec<u32>,
    /// How many tokens of the window are done.
    done: usize,
    /// The window's text as far as it was given.
    given: String,
}

impl Detokenizer {
    pub(super) fn new(tokenizer: Tokenizer, before: &[u32]) -> Self {
        let mut stream = Self { tokenizer, window: Vec::new(), done: 0, given: String::new() };
        if let Kind::Subwords(own) = &stream.tokenizer.0
            && !own.byte_level
        {
            let text = |id| own.inner.id_to_token(id).is_some_and(|token| !own.is_special(&token));
            let near = before.len().saturating_sub(WAIT);
            stream.window = before[near..].iter().copied().filter(|&id| text(id)).collect();
            stream.done = stream.window.len();
            let known = decode(own, &stream.window);
            stream.given = known.trim_end_matches(char::REPLACEMENT_CHARACTER).into();
        }
        stream
    }

    /// Appends the bytes that a token makes certain. Marks that are not text, and ids without a token, give
    /// nothing.
    pub fn push(&mut self, id: u32, bytes: &mut Vec<u8>) {
        let own = match &self.tokenizer.0 {
            Kind::Bytes => {
                bytes.extend(u8::try_from(id));
                return;
            }
            Kind::Subwords(own) => own.clone(),
        };
        let Some(token) = own.inner.id_to_token(id) else { return };
        if own.is_special(&token) {
            return;
        }
        if own.byte_level {
            bytes::append(&token, bytes);
            return;
        }
        self.window.push(id);
        let text = decode(&own, &self.window);
        let patient = self.window.len() - self.done <= WAIT;
        let clear = match patient {
            true => text.trim_end_matches(char::REPLACEMENT_CHARACTER).len(),
            false => text.len(),
        };
        let whole = clear == text.len();
        self.give(&own, &text[..clear], whole, bytes);
        if whole {
            // Decoders treat a text's first token differently: the next one keeps neighbours to its left.
            self.window.drain(..self.done);
            self.done = self.window.len();
            self.given = decode(&own, &self.window);
        }
    }

    /// The end of the text: appends what still waited.
    pub fn finish(&mut self, bytes: &mut Vec<u8>) {
        if let Kind::Subwords(own) = &self.tokenizer.0 {
            let own = own.clone();
            self.give(&own, &decode(&own, &self.window), true, bytes);
        }
        self.window.clear();
        self.given.clear();
        self.done = 0;
    }

    /// What is new in a text of which nothing more is to be waited for, or only its end.
    fn give(&mut self, own: &Subwords, text: &str, whole: bool, bytes: &mut Vec<u8>) {
        match text.strip_prefix(&self.given) {
            Some(new) => {
                bytes.extend_from_slice(new.as_bytes());
                self.given = text.into();
            }
            // Bytes that are no characters may change how a decoder reads those before them, which were given:
            // what waited stands for itself.
            None if whole => {
                let waited = &self.window[self.done..];
                bytes.extend_from_slice(decode(own, waited).as_bytes());
            }
            None => {}
        }
    }
}

/// Text of tokens; nothing where the decoder fails, as it has no text for them.
fn decode(own: &Subwords, ids: &[u32]) -> String {
    own.decode(ids, true).unwrap_or_default()
}
