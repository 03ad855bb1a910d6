pub mod frame;
pub mod sequencer;
