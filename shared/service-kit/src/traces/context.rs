//! The `traceparent` of W3C Trace Context, version 00.

use std::{fmt, str::FromStr};

use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};
use thiserror::Error;

const SAMPLED: u8 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    /// Never 0.
    pub trace: u128,
    /// Never 0.
    pub span: u64,
    flags: u8,
}

#[derive(Debug, PartialEq, Eq, Error)]
#[error("a traceparent has the form 00-<32 hex digits>-<16 hex digits>-<2 hex digits>, neither id all zeros")]
pub struct InvalidTraceContext;

impl TraceContext {
    pub(super) fn of(context: &SpanContext) -> Self {
        Self {
            trace: u128::from_be_bytes(context.trace_id().to_bytes()),
            span: u64::from_be_bytes(context.span_id().to_bytes()),
            flags: context.trace_flags().to_u8(),
        }
    }

    pub(super) fn to_span_context(self, is_remote: bool) -> SpanContext {
        let (trace, span) = (TraceId::from(self.trace), SpanId::from(self.span));
        SpanContext::new(trace, span, TraceFlags::new(self.flags), is_remote, TraceState::NONE)
    }

    pub fn is_sampled(self) -> bool {
        self.flags & SAMPLED != 0
    }

    pub(super) fn unsampled(self) -> Self {
        Self { flags: self.flags & !SAMPLED, ..self }
    }

    pub fn trace_id(self) -> String {
        format!("{:032x}", self.trace)
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.span, self.flags)
    }
}

impl FromStr for TraceContext {
    type Err = InvalidTraceContext;

    fn from_str(text: &str) -> Result<Self, InvalidTraceContext> {
        let hex = |part: &str, length| {
            part.len() == length && part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        };
        let mut parts = text.split('-');
        let (Some("00"), Some(trace), Some(span), Some(flags), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(InvalidTraceContext);
        };
        if !(hex(trace, 32) && hex(span, 16) && hex(flags, 2)) {
            return Err(InvalidTraceContext);
        }
        let context = Self {
            trace: u128::from_str_radix(trace, 16).map_err(|_| InvalidTraceContext)?,
            span: u64::from_str_radix(span, 16).map_err(|_| InvalidTraceContext)?,
            flags: u8::from_str_radix(flags, 16).map_err(|_| InvalidTraceContext)?,
        };
        if context.trace == 0 || context.span == 0 { Err(InvalidTraceContext) } else { Ok(context) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_well_formed_traceparent_round_trips() {
        for (text, sampled) in [
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", true),
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00", false),
            ("00-00000000000000000000000000000001-0000000000000001-fe", false),
        ] {
            let context: TraceContext = text.parse().unwrap();
            assert_eq!((context.to_string().as_str(), context.is_sampled()), (text, sampled));
        }
    }

    #[test]
    fn a_malformed_traceparent_is_rejected() {
        for bad in [
            "",
            "00",
            "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
            "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            assert_eq!(bad.parse::<TraceContext>(), Err(InvalidTraceContext), "{bad}");
        }
    }
}
