/// Why a guest cannot be described, built, or examined. The description is one sentence for the user.
public enum GuestProgramError: Error, Equatable, Sendable, CustomStringConvertible {
    /// No built-in guest has this name.
    case unknownGuest(name: String)
    /// The guest does not know this parameter; `possible` are the parameters it knows.
    case unknownParameter(guest: String, parameter: String, possible: [String])
    /// A parameter is there twice, or together with its opposite.
    case repeatedParameter(guest: String, parameter: String)
    /// The parameter's value is not of the expected form.
    case badValue(guest: String, parameter: String, value: String, expected: String)
    /// Guest and machine do not fit together.
    case doesNotFit(guest: String, reason: String)
    /// The memory holds no built-in guest, or one whose own description is damaged.
    case notAGuest(reason: String)
    /// The caller's reader could not read guest memory.
    case unreadable(physicalAddress: UInt64, reason: String)

    public var description: String {
        switch self {
        case .unknownGuest(let name):
            let names = GuestProgram.Kind.allCases.map(\.name).joined(separator: ", ")
            return "guest '\(name)' is unknown; possible are \(names)"
        case .unknownParameter(let guest, let parameter, let possible):
            let list = possible.joined(separator: ", ")
            return "guest \(guest) has no parameter '\(parameter)'; possible are \(list)"
        case .repeatedParameter(let guest, let parameter):
            return "guest \(guest): parameter '\(parameter)' is given twice or contradicts an earlier one; give it once"
        case .badValue(let guest, let parameter, let value, let expected):
            return "guest \(guest): \(parameter)='\(value)' is not possible; expected is \(expected)"
        case .doesNotFit(let guest, let reason):
            return "guest \(guest) does not fit: \(reason)"
        case .notAGuest(let reason):
            return "guest memory holds no built-in guest that can be checked: \(reason)"
        case .unreadable(let address, let reason):
            return "guest memory at 0x\(String(address, radix: 16)) cannot be read: \(reason)"
        }
    }
}
