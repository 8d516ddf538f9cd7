//! Continuing one sequence with tokens that are chosen on the card, some steps ahead of the host.

use std::ops::ControlFlow;
use std::time::Instant;

use super::{GpuEngine, Start};
use crate::generate::{Event, Finish, Generated, Generation, Options, Request, generate};
use crate::text::TokenText;
use crate::{Result, Runner};

/// Steps that the card is ahead of the host.
const AHEAD: usize = 4;

/// What has come of the sequence so far.
struct Continuation<'a> {
    options: &'a Options,
    shown: TokenText,
    tokens: Vec<u32>,
    text: String,
    finish: Option<Finish>,
}

impl Continuation<'_> {
    /// Takes a token on, and decides whether the sequence ends; `on_event` may end it too.
    fn receive(&mut self, token: u32, on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>) {
        self.tokens.push(token);
        let ended = self.options.end_of_sequence.contains(&token);
        let (mut text, stopped) =
            if ended { (String::new(), false) } else { self.shown.push(token) };
        let finish = match (stopped, ended, self.tokens.len() >= self.options.max_tokens) {
            (true, ..) => Some(Finish::Stop),
            (_, true, _) => Some(Finish::EndOfSequence),
            (.., true) => Some(Finish::Length),
            _ => None,
        };
        if finish.is_some() {
            text += &self.shown.finish(stopped);
        }
        self.text += &text;
        let interrupted = on_event(Event { sequence: 0, token, text: &text }).is_break();
        self.finish = self.finish.or(finish).or(interrupted.then_some(Finish::Interrupted));
    }
}

impl GpuEngine<'_> {
    /// [`generate`] of one request whose tokens, which are the same, are chosen on the card. The host reads them while
    /// later steps run; steps never go beyond a stop string or the end. After an interruption the tokens of the steps under
    /// way still come. [`Generated::logits`] is none if steps were made.
    ///
    /// # Errors
    /// As [`generate`].
    pub(super) fn choose_on_card(
        &mut self,
        request: &Request,
        options: &Options,
        on_event: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Generation> {
        let mut history = [request.history.as_slice(), request.prompt.as_slice()].concat();
        let shown = TokenText::new(options, self.config(), &history)?;
        // The first token comes out of the prompt.
        let first = Options { max_tokens: 1, tokenizer: None, stop: Vec::new(), ..options.clone() };
        let go_on = &mut |_: Event<'_>| ControlFlow::Continue(());
        let read = generate(self, std::slice::from_ref(request), &first, go_on)?;
        let mut timing = read.timing;
        let Some(read) = read.sequences.into_iter().next() else {
            return Ok(Generation { sequences: Vec::new(), timing });
        };
        let (tokens, text) = (Vec::new(), String::new());
        let mut made = Continuation { options, shown, tokens, text, finish: None };
        for &token in &read.tokens {
            history.push(token);
            made.receive(token, on_event);
        }
        let (mut state, mut logits) = (read.state, read.logits);
        if made.finish.is_none() {
            let started = Instant::now();
            let left = options.max_tokens - made.tokens.len();
            let start = Start { id: request.id, history: &history, max_tokens: left };
            // A step beyond a stop string would change the state.
            let ahead = if options.stop.is_empty() { AHEAD } else { 1 };
            let mut steps =
                self.sample(state, &[start], &options.sampling, &options.end_of_sequence)?;
            let mut launched = 0;
            while made.finish.is_none() {
                while steps.pending() < ahead && launched < left {
                    steps.launch()?;
                    launched += 1;
                }
                for (_, sampled) in steps.take()? {
                    made.receive(sampled.token, on_event);
                }
            }
            while steps.pending() > 0 {
                for (_, sampled) in steps.take()? {
                    made.receive(sampled.token, on_event);
                }
            }
            state = steps.finish()?;
            logits = None;
            timing.decode_tokens += made.tokens.len() - 1;
            timing.decode += started.elapsed();
        }
        let Continuation { tokens, text, finish, .. } = made;
        let finish = finish.unwrap_or(Finish::Length);
        if finish == Finish::Interrupted {
            logits = None;
        }
        let sequences = vec![Generated { tokens, text, finish, state, logits }];
        Ok(Generation { sequences, timing })
    }
}
