//! The device rules of a container as a BPF program: cgroup v2 has no files for them.
//!
//! [`compile`] is pure. Rules count from last to first, as in runc: a later rule overrides an earlier one, and what no rule
//! names is refused. Kernel: `BPF_PROG_TYPE_CGROUP_DEVICE`, `struct bpf_cgroup_dev_ctx` in `linux/bpf.h`.

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::sys::BpfInstruction;

const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;

/// One rule; `None` matches everything.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// Devices every container may use, by (major, minor); runc's list.
const ALWAYS: [(i32, Option<i32>); 9] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
];

/// The program for the rules of a spec, with what every container may use added at their end.
pub fn compile(spec: &[LinuxDeviceCgroup]) -> Vec<BpfInstruction> {
    let mut rules: Vec<_> = spec.iter().map(translate).collect();
    for kind in [BLOCK, CHARACTER] {
        rules.push(Rule { allow: true, kind: Some(kind), major: None, minor: None, access: MKNOD });
    }
    for (major, minor) in ALWAYS {
        let access = MKNOD | READ | WRITE;
        rules.push(Rule { allow: true, kind: Some(CHARACTER), major: Some(major), minor, access });
    }
    assemble(&rules)
}

fn translate(rule: &LinuxDeviceCgroup) -> Rule {
    let number =
        |number: Option<i64>| number.and_then(|number| i32::try_from(number).ok()).filter(|&number| number >= 0);
    let letters = rule.access().as_deref().unwrap_or("rwm");
    let bit = |letter, bit| if letters.contains(letter) { bit } else { 0 };
    Rule {
        allow: rule.allow(),
        kind: match rule.typ() {
            Some(LinuxDeviceType::B) => Some(BLOCK),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
            _ => None,
        },
        major: number(rule.major()),
        minor: number(rule.minor()),
        access: bit('r', READ) | bit('w', WRITE) | bit('m', MKNOD),
    }
}

// Registers: 1 holds the context, then 2 the type, 3 the access, 4 major, 5 minor; 0 is the answer.
const LOAD_WORD: u8 = 0x61;
const MOVE_REGISTER: u8 = 0xbc;
const MOVE_VALUE: u8 = 0xb4;
const AND_VALUE: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const JUMP_UNLESS_EQUAL: u8 = 0x56;
const JUMP_UNLESS_EQUAL_REGISTERS: u8 = 0x5e;
const EXIT: u8 = 0x95;

fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> BpfInstruction {
    BpfInstruction { code, registers: destination | source << 4, offset, immediate }
}

fn assemble(rules: &[Rule]) -> Vec<BpfInstruction> {
    let mut program = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(AND_VALUE, 2, 0, 0, 0xffff),
        instruction(LOAD_WORD, 3, 1, 0, 0),
        instruction(SHIFT_RIGHT, 3, 0, 0, 16),
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let mut block = Vec::new();
        if let Some(kind) = rule.kind {
            block.push(instruction(JUMP_UNLESS_EQUAL, 2, 0, 0, kind));
        }
        if rule.access != MKNOD | READ | WRITE {
            // Everything asked for must be among what the rule names; a refusal matches as soon as one is.
            block.push(instruction(MOVE_REGISTER, 0, 3, 0, 0));
            block.push(instruction(AND_VALUE, 0, 0, 0, rule.access));
            if rule.allow {
                block.push(instruction(JUMP_UNLESS_EQUAL_REGISTERS, 0, 3, 0, 0));
            } else {
                // Jump if the intersection is empty: JEQ.
                block.push(instruction(0x16, 0, 0, 0, 0));
            }
        }
        if let Some(major) = rule.major {
            block.push(instruction(JUMP_UNLESS_EQUAL, 4, 0, 0, major));
        }
        if let Some(minor) = rule.minor {
            block.push(instruction(JUMP_UNLESS_EQUAL, 5, 0, 0, minor));
        }
        block.push(instruction(MOVE_VALUE, 0, 0, 0, rule.allow.into()));
        block.push(instruction(EXIT, 0, 0, 0, 0));
        let length = block.len();
        let catches_all = length == 2;
        for (index, step) in block.iter_mut().enumerate() {
            if step.code & 0x07 == 0x06 {
                step.offset = (length - index - 1) as i16;
            }
        }
        program.extend(block);
        if catches_all {
            // What follows could not be reached, and the verifier refuses unreachable code.
            return program;
        }
    }
    program.push(instruction(MOVE_VALUE, 0, 0, 0, 0));
    program.push(instruction(EXIT, 0, 0, 0, 0));
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would, for the instructions used here.
    fn permits(program: &[BpfInstruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let context = [kind | access << 16, major, minor];
        let mut registers = [0i32; 6];
        let mut at = 0;
        loop {
            let step = program[at];
            let (destination, source) = ((step.registers & 15) as usize, (step.registers >> 4) as usize);
            at += 1;
            let jump = match step.code {
                LOAD_WORD => {
                    registers[destination] = context[step.offset as usize / 4];
                    false
                }
                MOVE_REGISTER => {
                    registers[destination] = registers[source];
                    false
                }
                MOVE_VALUE => {
                    registers[destination] = step.immediate;
                    false
                }
                AND_VALUE => {
                    registers[destination] &= step.immediate;
                    false
                }
                SHIFT_RIGHT => {
                    registers[destination] >>= step.immediate;
                    false
                }
                JUMP_UNLESS_EQUAL => registers[destination] != step.immediate,
                JUMP_UNLESS_EQUAL_REGISTERS => registers[destination] != registers[source],
                0x16 => registers[destination] == step.immediate,
                EXIT => return registers[0] == 1,
                other => panic!("unexpected instruction {other:#x}"),
            };
            if jump {
                at += step.offset as usize;
            }
        }
    }

    fn spec(json: &str) -> Vec<LinuxDeviceCgroup> {
        serde_json::from_str(json).expect("rules")
    }

    #[test]
    fn a_default_container_has_the_standard_devices_and_no_disks() {
        let program = compile(&spec(r#"[{"allow":false,"access":"rwm"}]"#));
        assert!(permits(&program, CHARACTER, READ | WRITE, 1, 3));
        assert!(permits(&program, CHARACTER, READ | WRITE, 136, 42));
        assert!(permits(&program, BLOCK, MKNOD, 8, 0));
        assert!(!permits(&program, BLOCK, READ, 8, 0));
        assert!(!permits(&program, CHARACTER, READ, 10, 200));
    }

    #[test]
    fn without_rules_only_the_standard_devices_work() {
        let program = compile(&[]);
        assert!(permits(&program, CHARACTER, READ, 1, 9));
        assert!(!permits(&program, CHARACTER, READ, 1, 1));
    }

    #[test]
    fn a_named_device_works_with_the_named_access() {
        let program = compile(&spec(
            r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"b","major":8,"minor":16,"access":"r"}]"#,
        ));
        assert!(permits(&program, BLOCK, READ, 8, 16));
        assert!(!permits(&program, BLOCK, READ | WRITE, 8, 16));
        assert!(!permits(&program, BLOCK, READ, 8, 17));
    }

    #[test]
    fn a_privileged_container_may_use_everything() {
        let program = compile(&spec(r#"[{"allow":true,"access":"rwm"}]"#));
        assert!(permits(&program, BLOCK, READ | WRITE | MKNOD, 259, 3));
    }

    #[test]
    fn a_later_refusal_overrides() {
        let program = compile(&spec(
            r#"[{"allow":true,"access":"rwm"},{"allow":false,"type":"c","major":10,"minor":200,"access":"w"}]"#,
        ));
        assert!(permits(&program, CHARACTER, READ, 10, 200));
        assert!(!permits(&program, CHARACTER, READ | WRITE, 10, 200));
    }
}
